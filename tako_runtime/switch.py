"""The switch to another release, on a server, in one go: whoever asked for it may be gone by the next line.

    write the units -> start the release's own, with the secrets that it came with, which proves itself and takes over
    (`rollover.py`) -> it may start at boot -> `current` names it -> the one before may not any more -> its secrets are
    the app's -> old releases go

`current`, a link that is replaced in one rename, is the one truth: the unit of a release starts only if that names it,
or while it is on trial. So whatever cuts this off, a power cut too, the next boot starts exactly one release.
"""

import contextlib
import fcntl
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import disk
from tako_runtime.errors import TakoError
from tako_runtime.rollover import LINES, Report
from tako_runtime.rotation import bring, settle

#: How often systemd is asked how far a unit is, and how long a release may take to be taken, in seconds.
_LOOK, PATIENCE = 0.1, 300.0

#: How long another switch of the same app is waited for, in seconds.
_OTHERS = 180.0

Say = Callable[[str], None]


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be switched. `files` are the units by name; without any, those that the release was deployed with."""

    release: str
    base: Path  # {base}/<slug>
    app_dir: Path
    units_dir: Path
    unit: str  # the prefix of every unit of the app: "tako-shop"
    trial: Path
    user: bool = False
    files: Mapping[str, str] = {}
    keep: int = 5
    secrets: str | None = None  # the envelope of those that it comes with; None leaves those that are there
    account: str = ""  # whom their file is to belong to, where that is not who switches


class NotSwitched(TakoError):
    """The release was not taken; what ran before runs on."""

    code = "not_taken"

    def __init__(self, message: str, last_lines: list[str]) -> None:
        super().__init__(message)
        self.last_lines = last_lines


def switch(spec: Spec, say: Say) -> dict[str, Any]:
    """Carry it out. Gives what was before, and the releases that still drain. Raises `NotSwitched`, or `OSError` where
    the disk is full or broken."""
    with _alone(spec.base / "switch.lock", say):
        before = _linked(spec, "current")
        files = dict(spec.files) or _kept(spec)
        say("writes the units")
        _place(spec, files)
        settle(spec.app_dir, before)
        try:
            if spec.secrets is not None:
                bring(spec.app_dir, spec.release, spec.secrets.encode(), spec.account)
            if before == spec.release and _state(spec, spec.release)["ActiveState"] == "active":
                say("runs already")
            else:
                _try(spec, say)
            _systemctl(spec, "enable", _unit(spec, spec.release))  # of those that are, `current` picks one at a boot
            _make_current(spec, before)
        except (NotSwitched, OSError):
            if _linked(spec, "current") != spec.release:
                _restore(spec, before, say)
            raise
        finally:
            spec.trial.unlink(missing_ok=True)
            settle(spec.app_dir, _linked(spec, "current"))
        if before is not None and before != spec.release:
            _systemctl(spec, "disable", _unit(spec, before), check=False)
        if f"{spec.unit}.socket" not in files:
            _without_socket(spec)
        gone = _prune(spec, say)
        return {"release": spec.release, "before": before, "draining": _draining(spec), "pruned": gone}


# --- the release's unit ----------------------------------------------------------------------------------------------


def _try(spec: Spec, say: Say) -> None:
    """Start it on trial, until it is taken or not."""
    unit = _unit(spec, spec.release)
    report = spec.app_dir / "trial.json"
    report.unlink(missing_ok=True)
    spec.trial.parent.mkdir(parents=True, exist_ok=True)
    spec.trial.write_text(f"{spec.release}\n")
    spec.trial.chmod(0o644)
    _systemctl(spec, "reset-failed", unit, check=False)
    _systemctl(spec, "start", "--no-block", unit)
    until = time.monotonic() + PATIENCE
    stage, begun = "", False
    while True:
        state = _state(spec, spec.release)
        said = _report(report, spec.release)
        if said is not None and said.stage != stage:
            stage = said.stage
            if stage not in ("failed", "taken"):
                say(stage)
        active = state["ActiveState"]
        begun = begun or active == "activating"
        if active == "active":
            return
        failed = active == "failed" or state["SubState"] == "auto-restart" or (begun and active == "inactive")
        if failed or time.monotonic() > until:
            why = f"{unit} ended ({state['Result']})" if failed else f"{unit} is not up after {PATIENCE:g} s"
            lines = _journal(spec, unit)
            if said is not None and said.error:
                why, lines = said.error, said.last_lines or lines
            _systemctl(spec, "stop", unit, check=False)
            _systemctl(spec, "reset-failed", unit, check=False)
            raise NotSwitched(why, lines)
        time.sleep(_LOOK)


def _restore(spec: Spec, before: str | None, say: Say) -> None:
    """The one before runs on. Where the new one had got as far as to take over, it is ended, and that started again."""
    _systemctl(spec, "disable", "--now", _unit(spec, spec.release), check=False)
    if before is None:
        return
    if _state(spec, before)["ActiveState"] not in ("active", "activating", "reloading"):
        say(f"starts {before} again")
        _systemctl(spec, "start", _unit(spec, before), check=False)


def _make_current(spec: Spec, before: str | None) -> None:
    """In one rename, synced: a power cut leaves the one or the other. The units, enabled as they are by now, may be on
    another disk, and have to be there before."""
    subprocess.run(["sync", "-f", spec.units_dir], check=False)
    links = {"current": spec.release}
    if before is not None and before != spec.release:
        links["previous"] = before
    for link, release in links.items():
        fresh = spec.base / f".{link}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(f"releases/{release}")
        fresh.rename(spec.base / link)
    disk.sync(spec.base)


def _draining(spec: Spec) -> list[str]:
    """The releases whose units have not ended yet, without the one that runs."""
    said = _systemctl(spec, "list-units", "--plain", "--no-legend", "--no-pager", f"{spec.unit}@*.service").stdout
    found = [line.split() for line in said.splitlines()]
    units = [words[0] for words in found if len(words) > 3 and words[2] in ("active", "deactivating", "activating")]
    return sorted(name for unit in units if (name := _release(spec, unit)) != spec.release)


def _state(spec: Spec, release: str) -> dict[str, str]:
    told = ["ActiveState", "SubState", "Result"]
    said = _systemctl(spec, "show", "--property", ",".join(told), _unit(spec, release)).stdout
    return {**dict.fromkeys(told, ""), **dict(line.split("=", 1) for line in said.splitlines() if "=" in line)}


def _report(file: Path, release: str) -> Report | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        found = msgspec.json.decode(file.read_bytes(), type=Report)
        return found if found.release == release else None
    return None


def _journal(spec: Spec, unit: str) -> list[str]:
    """The last lines that it wrote itself: what failed before it could report."""
    named = ["--user-unit" if spec.user else "--unit", unit]
    words = ["journalctl", *named, "--no-pager", "--output=cat", f"--lines={LINES}"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [_sentence(line) for line in said.splitlines() if line.strip()]


def _sentence(line: str) -> str:
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        return line


# --- units -----------------------------------------------------------------------------------------------------------


def _place(spec: Spec, files: Mapping[str, str]) -> None:
    """The units where systemd finds them, and beside the release, for a way back. A socket that has come to listen
    elsewhere is opened anew; else it stays open as it is, for it cannot be opened while an app still has it."""
    kept = spec.base / "releases" / spec.release / ".release" / "units"
    socket = f"{spec.unit}.socket"
    there = spec.units_dir / socket
    moved = socket in files and there.is_file() and _listens(there.read_text()) != _listens(files[socket])
    for folder in (kept, spec.units_dir):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            fresh = folder / f".{name}.new"
            fresh.write_text(text)
            fresh.rename(folder / name)
    _systemctl(spec, "daemon-reload")
    if moved:
        _systemctl(spec, "stop", f"{spec.unit}.service", socket)
    if socket in files:
        _systemctl(spec, "enable", "--now", socket)


def _listens(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Listen")]


def _kept(spec: Spec) -> dict[str, str]:
    folder = spec.base / "releases" / spec.release / ".release" / "units"
    files = {path.name: path.read_text() for path in sorted(folder.glob("tako-*"))} if folder.is_dir() else {}
    if not files:
        raise NotSwitched(f"the release {spec.release} is not on this server, or was never run here", [])
    return files


def _without_socket(spec: Spec) -> None:
    """The release has no app that takes a socket: the one of an earlier release closes."""
    if (spec.units_dir / f"{spec.unit}.socket").exists():
        _systemctl(spec, "disable", "--now", f"{spec.unit}.socket", check=False)
        _systemctl(spec, "stop", f"{spec.unit}.service", check=False)
        for name in (f"{spec.unit}.socket", f"{spec.unit}.service"):
            (spec.units_dir / name).unlink(missing_ok=True)
        _systemctl(spec, "daemon-reload")


def _unit(spec: Spec, release: str) -> str:
    return f"{spec.unit}@{release}.service"


def _release(spec: Spec, unit: str) -> str:
    return unit.removeprefix(f"{spec.unit}@").removesuffix(".service")


def _systemctl(spec: Spec, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        ["systemctl", *["--user"] * spec.user, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise NotSwitched(f"systemctl {' '.join(words)} ended with {done.returncode}", done.stderr.splitlines())
    return done


# --- old releases ----------------------------------------------------------------------------------------------------


def _prune(spec: Spec, say: Say) -> list[str]:
    """All but the current one, those that still drain, and the newest; with their units."""
    there = sorted((spec.base / "releases").iterdir(), key=lambda path: path.lstat().st_mtime, reverse=True)
    named = [path.name for path in there if path.is_dir() and not path.name.startswith(".")]
    staying = {
        spec.release,
        _linked(spec, "previous"),
        *_draining(spec),
        *[name for name in named if name != spec.release][: spec.keep - 1],
    }
    gone = [name for name in named if name not in staying]
    for name in gone:
        say(f"removes the release {name}")
        _systemctl(spec, "disable", _unit(spec, name), check=False)
        (spec.units_dir / _unit(spec, name)).unlink(missing_ok=True)
        shutil.rmtree(spec.base / "releases" / name, ignore_errors=True)
    if gone:
        _systemctl(spec, "daemon-reload")
    return gone


def _linked(spec: Spec, link: str) -> str | None:
    try:
        return (spec.base / link).readlink().name
    except OSError:
        return None


@contextlib.contextmanager
def _alone(path: Path, say: Say) -> Iterator[None]:
    """Two switches of one app would be one too many: the other may be that of a deploy whose command was killed."""
    with path.open("a") as file:
        until = time.monotonic() + _OTHERS
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise NotSwitched(f"another switch has held {path} for {_OTHERS:g} s", []) from None
            if not told:
                told = True
                say("waits for another switch to end")
            time.sleep(_LOOK)
        yield
