"""What a deploy does on one server, as named steps: pure, from the project, the release and what the server answered.

Each step is one command there, which may be carried out again: whatever was cut off, the next deploy goes over it. Only
the last one touches what runs. A command is a list of words, built here, carried out in `carry_out.py`, tested as text.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tako_cli.deploy.facts import Facts, Place
from tako_cli.deploy.lock import Target
from tako_cli.deploy.release import Release
from tako_cli.deploy.units import units
from tako_runtime.config import Config
from tako_runtime.manifest import Manifest
from tako_runtime.secrets import VARIABLE, envelope
from tako_runtime.store import DATABASE_URL

#: What a deploy that was cut off has left is removed too: nobody else is at it, since we have the lock.
_FOLDERS_OF_ROOT = """
set -e; umask 022; base=$1 data=$2 app=$3 account=$4
id -u "$account" >/dev/null 2>&1 ||
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$account"
install -d "$base" "$base/releases" "$base/incoming" "$data" "$data/apps"
install -d -o "$account" -g "$account" -m 750 "$base/shared"
install -d -o "$account" -g "$account" -m 700 "$app"
rm -rf "$base"/incoming/* "$base"/releases/.[!.]*
"""

_FOLDERS_OF_USER = """
set -e; umask 077; base=$1 data=$2 app=$3
mkdir -p "$base/releases" "$base/incoming" "$base/shared" "$app"
chmod 700 "$app"
rm -rf "$base"/incoming/* "$base"/releases/.[!.]*
"""

_UNPACK = 'archive=$1; shift; "$@" && rm -f "$archive"'

#: An environment that was not finished is begun anew; a finished one is left alone.
_ENVIRONMENT_BY_PIP = """
set -e; umask 022; python=$1 requirements=$2 pip=$3; cd "$4/.release"
[ ! -e ../.venv/.ready ] || exit 0
rm -rf ../.venv
"$python" -m venv --without-pip ../.venv
"$python" "../$pip/pip" --python ../.venv/bin/python install --quiet --disable-pip-version-check --no-input \\
    --root-user-action=ignore --no-cache-dir --require-hashes -r "../$requirements"
sync -f ../.venv
touch ../.venv/.ready
"""

_ENVIRONMENT_BY_UV = """
set -e; umask 022; python=$1 requirements=$2 uv=$3; cd "$4/.release"
[ ! -e ../.venv/.ready ] || exit 0
rm -rf ../.venv
"$uv" venv --quiet --no-config --python "$python" ../.venv
"$uv" pip install --quiet --link-mode copy --compile-bytecode --python ../.venv/bin/python --require-hashes \\
    -r "../$requirements"
sync -f ../.venv
touch ../.venv/.ready
"""

#: Holds the lock for as long as its input says now and then that somebody is there. Who holds it is named in the file,
#: for whoever is refused.
LOCK = """
import fcntl, json, os, select, sys
path, who = sys.argv[1:3]
os.makedirs(os.path.dirname(path), exist_ok=True)
file = open(path, "a+")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    file.seek(0)
    print(file.read() or "{}", flush=True)
    sys.exit(1)
file.truncate(0)
file.write(who)
file.flush()
print("held", flush=True)
while select.select([0], [], [], 30)[0] and os.read(0, 4096):
    pass
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One command on a server. `name` is for programs, `title` for people; `file` is uploaded, `given` is its input,
    which is not shown where it is `secret`."""

    name: str
    title: str
    words: Sequence[str]
    given: bytes = b""
    file: Path | None = None
    secret: bool = False

    @property
    def text(self) -> str:
        """The command for people, as a shell would take it."""
        if self.file is not None:
            return f"cat > {shlex.quote(self.words[-1])} < {shlex.quote(str(self.file))}"
        return shlex.join(self.words) + (" < [REDACTED]" if self.secret else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps for one server. What is in `prepare` changes nothing of what runs; `switch` does."""

    server: str
    place: Place
    release: str
    prepare: Sequence[Step]
    switch: Step
    fit: Step | None = None

    @property
    def steps(self) -> list[Step]:
        return [*self.prepare, *([self.fit] if self.fit else []), self.switch]


def to_be_shared(config: Config, servers: Sequence[str], manifest: Manifest) -> list[str]:
    """The workflows for which these servers would need a store that they share, and have none."""
    if len(servers) < 2 or config.storage.url != "sqlite":
        return []
    return [flow.name for flow in manifest.workflows if not flow.local]


def plan(
    config: Config, release: Release, facts: Facts, *, secrets: Mapping[str, str] | None = None, by: Mapping[str, Any]
) -> Plan:
    """The plan for one server that has no problems. `secrets` are to be there, None leaves those that are; `by` says
    who deploys, and when."""
    place, target = facts.place, facts.target
    assert place is not None
    assert target is not None
    name = _name(release, facts)
    known = facts.known(name)
    prepare = [_folders(place)]
    if known is None:
        archive = f"{place.base}/incoming/{release.digest}.tar.gz"
        told = json.dumps({**by, "env": place.env, "server": facts.server})
        unpacker = Path(__file__).with_name("unpack.py").read_bytes()
        words = [place.python, "-", f"{place.base}/releases", name, release.digest, archive, told]
        prepare += [
            Step("upload", "uploads the release", ["upload", archive], file=release.file),
            Step("unpack", "unpacks it", ["sh", "-c", _UNPACK, "unpack", archive, *words], given=unpacker),
        ]
    if known is None or not known["ready"]:
        prepare.append(_environment(place, name, release, target))
    files = units(config, facts.server, place, name)
    return Plan(
        facts.server, place, name, prepare, switch(place, name, files, config.deploy.keep_releases, secrets),
        fit(place, name, secrets) if _has_runs(config, facts) else None,
    )  # fmt: skip


def back(config: Config, facts: Facts, release: str) -> Plan:
    """The plan for the way back to a release that the server has."""
    place = facts.place
    assert place is not None
    looked = fit(place, release) if _has_runs(config, facts) else None
    return Plan(facts.server, place, release, [], switch(place, release, {}, config.deploy.keep_releases), looked)


def _has_runs(config: Config, facts: Facts) -> bool:
    """Whether there is a store to look into: on that server, or shared."""
    return config.storage.url != "sqlite" or bool(facts.answer.get("schema"))


def _name(release: Release, facts: Facts) -> str:
    """The release's id there: another one where the server has that id with other bytes."""
    known = facts.known(release.id)
    return release.id if known is None or known.get("digest") == release.digest else release.other_id


def fit(place: Place, release: str, secrets: Mapping[str, str] | None = None) -> Step:
    """Which live runs the release would not know any more, in the store that these `secrets` lead to: until the switch
    the server has others."""
    title = "looks which runs it would not know"
    if secrets is None or DATABASE_URL not in secrets:
        return Step("fit", title, _as_app(place, release, "fit"))
    words = _as_app(place, release, "fit", told=[f"{VARIABLE}=0"])
    return Step("fit", title, words, given=envelope({DATABASE_URL: secrets[DATABASE_URL]}), secret=True)


def migrate(place: Place, release: str, *, breaking: bool) -> Step:
    """Bring the store to the release's version; `breaking`: though older ones could not work with that."""
    return Step("migrate", "migrates the store", _as_app(place, release, "migrate", *["--breaking"] * breaking))


def _as_app(place: Place, release: str, verb: str, *words: str, told: Sequence[str] = ()) -> list[str]:
    """A release's own runtime, as the app runs it, though it is not the one that does."""
    home = [f"TAKO_APP_NAME={place.app}", f"TAKO_DATA_DIR={place.data_dir}", f"TAKO_ENV={place.env}"]
    run = ["env", *home, *told, ".venv/bin/python", "-P", "-m", "tako_runtime", verb, *words]
    return place.as_account(["sh", "-c", 'cd "$1" && shift && exec "$@"', verb, place.release(release), *run])


def switch(
    place: Place, release: str, files: Mapping[str, str], keep: int, secrets: Mapping[str, str] | None = None
) -> Step:
    """The switch, in one process there. Without `files`, the release's own units are taken; without `secrets`, those
    that are there."""
    spec = {
        "release": release, "base": place.base, "app_dir": place.app_dir, "units_dir": place.units_dir,
        "unit": place.unit, "trial": place.trial, "user": place.user, "files": dict(files), "keep": keep,
        "secrets": None if secrets is None else envelope(secrets).decode(),
        "account": "" if place.user else place.account,
    }  # fmt: skip
    python = f"{place.release(release)}/.venv/bin/python"
    told = ["env", f"XDG_RUNTIME_DIR={place.runtime_dir}"] if place.user else []
    words = ["sh", "-c", 'cd / && exec "$@"', "switch", *told, python, "-P", "-m", "tako_runtime", "switch"]
    return Step("switch", "switches to it", words, given=json.dumps(spec).encode(), secret=secrets is not None)


def lock(place: Place, who: Mapping[str, Any]) -> list[str]:
    """The command that holds the server's lock."""
    return [place.python, "-c", LOCK, f"{place.base}/deploy.lock", json.dumps(who)]


def _folders(place: Place) -> Step:
    script = _FOLDERS_OF_USER if place.user else _FOLDERS_OF_ROOT
    words = ["sh", "-c", script, "folders", place.base, place.data_dir, place.app_dir, place.account]
    return Step("folders", "makes its folders", words)


def _environment(place: Place, name: str, release: Release, target: Target) -> Step:
    requirements, folder = release.requirements[target], place.release(name)
    if place.uv:
        words = ["sh", "-c", _ENVIRONMENT_BY_UV, "environment", place.python, requirements, place.uv, folder]
    else:
        words = ["sh", "-c", _ENVIRONMENT_BY_PIP, "environment", place.python, requirements, release.pip, folder]
    return Step("environment", "installs what it needs", words)
