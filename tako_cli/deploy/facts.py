"""What the servers answer before anything is changed: all are asked at once, and what speaks against it is told."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tako_cli.deploy.lock import Target
from tako_cli.remote import Remote
from tako_runtime import clock
from tako_runtime.config import Config
from tako_runtime.errors import TakoError
from tako_runtime.secrets import VARIABLE, envelope
from tako_runtime.store import DATABASE_URL, EMBEDDED

#: The oldest Python and systemd that will do.
PYTHON, SYSTEMD = (3, 11), 249

#: How far a server's clock may be off, in seconds: leases and schedules go by it.
SKEW = 5.0

#: So many bytes have to be free on a server: a release, its environment, and what the store writes meanwhile.
ROOM = 200 << 20

#: Finds a Python that will do; where there is none, says which there is.
_FIND = """
for name in python3.14 python3.13 python3.12 python3.11 python3; do
    found=$(command -v "$name") || continue
    "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && exec "$found" - "$@"
done
printf '{"python": ["", "%s"]}' "$(python3 -V 2>/dev/null)"
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything of an app is on one server."""

    slug: str
    app: str
    env: str
    base: str  # .../tako/<slug>
    data_dir: str
    user: bool
    account: str  # who runs it
    units_dir: str
    runtime_dir: str
    python: str
    uv: str = ""

    @property
    def app_dir(self) -> str:
        return f"{self.data_dir}/apps/{self.app}"

    @property
    def unit(self) -> str:
        return f"tako-{self.slug}"

    @property
    def trial(self) -> str:
        """The file that names a release on trial. It does not outlive a boot."""
        return f"{self.runtime_dir}/{self.unit}.trial"

    def release(self, release: str) -> str:
        return f"{self.base}/releases/{release}"

    def as_account(self, words: Sequence[str]) -> list[str]:
        """A command as the user whom the app's files belong to."""
        return list(words) if self.user else ["runuser", "-u", self.account, "--", *words]


@dataclass(frozen=True, slots=True)
class Facts:
    """What one server answered. `problems` stop a deploy; `place` and `target` are there where there are none."""

    server: str
    host: str
    answer: Mapping[str, Any] = field(default_factory=dict)
    place: Place | None = None
    target: Target | None = None
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    skew: float = 0.0

    @property
    def current(self) -> str:
        return str(self.answer.get("current", ""))

    @property
    def previous(self) -> str:
        return str(self.answer.get("previous", ""))

    @property
    def runs_current(self) -> bool:
        """Whether the current release's unit is up."""
        place = self.place
        return place is not None and self.unit_state(self.current) == "active"

    @property
    def runs(self) -> bool:
        """Whether any release's unit is up, or not yet down."""
        return any(self.unit_state(str(one["id"])) not in ("", "inactive", "failed") for one in self.releases)

    def unit_state(self, release: str) -> str:
        assert self.place is not None
        return str(self.answer.get("units", {}).get(f"{self.place.unit}@{release}.service", ""))

    @property
    def releases(self) -> list[Mapping[str, Any]]:
        return list(self.answer.get("releases", ()))

    def known(self, release: str) -> Mapping[str, Any] | None:
        return next((one for one in self.releases if one["id"] == release), None)


def slug(config: Config, env: str) -> str:
    """What an app is called on a server. No app's name has a dot, so none of these are alike."""
    return config.name if env == "production" else f"{config.name}.{env}"


def ask_all(
    config: Config, env: str, remotes: Sequence[Remote], *, secrets: Mapping[str, str] | None = None
) -> list[Facts]:
    """Every server at once, in the order given. Nothing is changed. The shared store is asked too where there are
    `secrets`: with those, else with the server's own."""
    with ThreadPoolExecutor(max(len(remotes), 1)) as pool:
        return list(pool.map(lambda remote: ask(config, env, remote, secrets=secrets), remotes))


def ask(config: Config, env: str, remote: Remote, *, secrets: Mapping[str, str] | None = None) -> Facts:
    source = Path(__file__).with_name("asked.py").read_bytes()
    words = ["sh", "-c", _FIND, "ask", slug(config, env), config.name, env, config.deploy.data_dir or ""]
    try:
        remote.connect()
        before = clock.SystemClock().now()
        done = remote.run(words, input=source, timeout=60)
        after = clock.SystemClock().now()
    except TakoError as error:
        return _unreachable(remote, error)
    try:
        answer = dict(json.loads(done.out.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        said = (done.err or done.out).strip().splitlines()
        why = f"it cannot be asked: {said[-1] if said else f'sh ended with {done.code}'}"
        return Facts(remote.name, remote.host, problems=(why,))
    if secrets is not None and config.storage.url != EMBEDDED and answer.get("current"):
        try:
            answer["shared"] = _ask_shared(config, env, remote, secrets)
        except TakoError as error:
            return _unreachable(remote, error)
    return read(config, env, remote, answer, (before + after) / 2 / clock.SECOND)


def _ask_shared(config: Config, env: str, remote: Remote, secrets: Mapping[str, str]) -> Mapping[str, Any]:
    """What the current release there, whose environment speaks to databases, finds out about the store that this deploy
    is to work with: the app may have had another one. Empty where that release cannot tell; the new one will."""
    from tako_cli.afar import runtime, there

    told = ["env", f"TAKO_STORAGE={config.storage.url}", f"{VARIABLE}=0"]
    given = envelope({name: secrets[name] for name in (DATABASE_URL,) if name in secrets})
    done = remote.run(there(config, env, [*told, *runtime("serves")]), input=given, timeout=60)
    try:
        return dict(json.loads(done.out.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        return {}


def _unreachable(remote: Remote, error: TakoError) -> Facts:
    why = str(error).removeprefix(f"{remote.name}: ")
    return Facts(remote.name, remote.host, problems=(why,), hints=(error.hint,))


def read(config: Config, env: str, remote: Remote, answer: Mapping[str, Any], here: float) -> Facts:
    """What an answer means. `here` is this machine's time when it was given. Pure."""
    if not answer.get("machine"):
        found = str(answer["python"][1]) or "none"
        why = f"its Python is too old: {found}; 3.11 it has to be"
        return Facts(
            remote.name, remote.host, answer, problems=(why,), hints=("Install one beside it: apt install python3.11",)
        )
    problems: list[tuple[str, str]] = []
    user, name = not answer["root"], slug(config, env)
    if not answer["systemd"].isdigit() or int(answer["systemd"]) < SYSTEMD:
        problems.append((f"systemd is {answer['systemd'] or 'not there'}: {SYSTEMD} it has to be", ""))
    elif not answer["manager"]:
        problems.append(("systemctl --user does not answer" if user else "systemctl does not answer", ""))
    if user and not answer["linger"]:
        why = f"the services of {answer['user']} end with its last login"
        problems.append((why, f"Have them linger, once, as root: loginctl enable-linger {answer['user']}"))
    if not answer["glibc"]:
        problems.append(("it has no glibc: only servers with one are known", ""))
    skew = answer["time"] - here
    if abs(skew) > SKEW:
        direction = "ahead" if skew > 0 else "behind"
        problems.append((f"its clock is {abs(skew):.0f} s {direction}", "Have it set by NTP: timedatectl set-ntp true"))
    least = min(answer["free"], answer["free_data"])
    if least < ROOM:
        problems.append((f"only {least >> 20} MiB are free: {ROOM >> 20} MiB it takes", "Make room there."))
    if answer["lock"] is not None:
        problems.append(
            (
                locked(answer["lock"], answer["time"]),
                "Wait for it to end. A deploy that was killed lets go within a minute.",
            )
        )
    shared = answer.get("shared", {})
    for takes, knows in ((answer["schema"], schema()), (shared.get("serves"), schema("postgres"))):
        if (takes or 0) > knows:
            why = f"its store is for a newer tako: it takes version {takes}, and this one knows {knows}"
            problems.append((why, "Upgrade tako here."))
    if "error" in shared:
        problems.append((shared["error"], shared["hint"]))
    target = Target(".".join(answer["python"][1].split(".")[:2]), answer["machine"], answer["glibc"])
    place = Place(
        name, config.name, env, answer["base"], answer["data_dir"], user, answer["user"] if user else "tako",
        f"{answer['base'].split('/.local/')[0]}/.config/systemd/user" if user else "/etc/systemd/system",
        answer["runtime_dir"], answer["python"][0], answer["uv"],
    )  # fmt: skip
    return Facts(
        remote.name, remote.host, answer, place, target, tuple(why for why, _ in problems),
        tuple(hint for _, hint in problems), skew,
    )  # fmt: skip


def schema(dialect: str = "sqlite") -> int:
    """The version of the embedded store, or the other kind, that this tako writes."""
    from tako_runtime.store.version import newest

    return newest(dialect)


def locked(lock: Mapping[str, Any], now: float) -> str:
    """Who deploys right now, and for how long."""
    who = f"{lock.get('user', 'somebody')} on {lock.get('host', 'another machine')}"
    since = max(0, round(now - float(lock.get("since", now))))
    return f"a deploy of {who} is under way, for {clock.spell(since * clock.SECOND)}"


def connect(config: Config, names: Sequence[str], *, asking: bool) -> list[Remote]:
    return [Remote(name, config.servers[name].host, asking=asking) for name in names]
