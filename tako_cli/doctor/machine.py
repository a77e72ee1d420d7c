"""What every project needs of a machine."""

import os
import shutil
import subprocess
import sys
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tako_cli.doctor import Finding, broken, warning, well
from tako_runtime import clock

#: Before 3.51.3 two connections that checkpoint and commit at once can damage the file.
SQLITE = (3, 51, 3)
PYTHON = (3, 11)

#: No clock that is right shows less: this check is younger.
YOUNGEST = clock.instant(datetime(2025, 1, 1, tzinfo=UTC))

#: What the wall clock may go otherwise than the machine's own counter, while the doctor looks.
JUMP = clock.SECOND

#: Where a shell looks for what completes a command; the first is where `tako completions` says to put it.
COMPLETIONS = {
    "bash": ("~/.local/share/bash-completion/completions/tako", "/usr/share/bash-completion/completions/tako"),
    "zsh": ("~/.zfunc/_tako", "/usr/local/share/zsh/site-functions/_tako", "/usr/share/zsh/site-functions/_tako"),
    "fish": ("~/.config/fish/completions/tako.fish", "/usr/share/fish/vendor_completions.d/tako.fish"),
}


def machine(started: tuple[int, int], *, deploys: bool) -> Iterator[Finding]:
    """All of it. `started` is what both clocks showed when the doctor began; whoever deploys needs ssh."""
    import apsw

    yield python(sys.version_info[:3], Path(sys.executable))
    yield sqlite(apsw.sqlite_lib_version())
    yield zones()
    wall, counted = reading()
    yield time(wall, wall - started[0] - (counted - started[1]), synchronised())
    yield ssh(shutil.which("ssh"), needed=deploys)
    yield completions(Path(os.environ.get("SHELL", "")).name)


def python(version: tuple[int, ...], executable: Path) -> Finding:
    shown = f"{_dotted(version)}, {executable}"
    if version[:2] < PYTHON:
        return broken("python", f"{shown}: too old", f"Install tako with Python {_dotted(PYTHON)} or later.")
    return well("python", shown)


def sqlite(version: str) -> Finding:
    """The one that apsw carries, not that of the machine."""
    if tuple(int(part) for part in version.split(".")[:3]) < SQLITE:
        why = "processes that write at once can damage the store"
        return broken("sqlite", f"{version}, in which {why}", f"pip install --upgrade 'apsw>={_dotted(SQLITE)}'")
    return well("sqlite", f"{version}, in apsw")


def zones() -> Finding:
    """Time zones for schedules, and that one fires at the time it should: 9 in Berlin is 8 in UTC in January."""
    from tako_runtime.cron import Schedule

    try:
        berlin = Schedule.parse("0 9 * * *", "Europe/Berlin")
        fires = berlin.next(clock.instant(datetime(2026, 1, 5, tzinfo=UTC)))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        return broken("zones", f"no data of time zones: {error}", "pip install --upgrade tzdata")
    if fires != clock.instant(datetime(2026, 1, 5, 8, tzinfo=UTC)):
        return broken(
            "zones",
            f"9:00 in Berlin comes out as {clock.iso(fires)}",
            "pip install --upgrade tzdata 'croniter>=6.2,<8'",
        )
    return well("zones", "schedules and time zones work")


def time(now: int, drift: int, synced: bool | None) -> Finding:
    """`drift` is what the wall clock has gone otherwise than the machine's own counter; `synced` is None where nobody
    says."""
    shown = clock.iso(now)[:19] + "Z"
    mend = "Have the time set from the network: timedatectl set-ntp true"
    if now < YOUNGEST:
        return broken("clock", f"{shown} cannot be: leases, sleeps and schedules go by this clock", mend)
    if abs(drift) > JUMP:
        return broken(
            "clock", f"it has jumped by {clock.spell(drift)} just now", "Find out what sets it; one at a time."
        )
    if synced is False:
        return warning("clock", f"{shown}, not set from the network", mend)
    return well("clock", f"{shown}{', set from the network' if synced else ''}")


def reading() -> tuple[int, int]:
    """The wall clock and the machine's own counter."""
    return clock.SystemClock().now(), clock.monotonic()


def synchronised() -> bool | None:
    """What systemd says of the clock, where it says something."""
    words = ["timedatectl", "show", "--property", "NTPSynchronized", "--value"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"yes": True, "no": False}.get(said)


def ssh(program: str | None, *, needed: bool) -> Finding:
    if program is not None:
        return well("ssh", program)
    mend = "Install it: apt install openssh-client"
    return (broken if needed else warning)("ssh", "there is none, so nothing can be deployed", mend)


def completions(shell: str) -> Finding:
    from typer._completion_shared import get_completion_script

    if shell not in COMPLETIONS:
        return well("completions", f"none for the shell {shell or 'of this process'}")
    places = [Path(place).expanduser() for place in COMPLETIONS[shell]]
    there = next((place for place in places if place.is_file()), None)
    folder, _, _ = COMPLETIONS[shell][0].rpartition("/")
    mend = f"mkdir -p {folder} && tako completions {shell} > {COMPLETIONS[shell][0]}"
    if there is None:
        return warning("completions", f"not found for {shell}", mend)
    script = get_completion_script(prog_name="tako", complete_var="_TAKO_COMPLETE", shell=shell)
    if there.read_text("utf-8", errors="replace").strip() != script.strip():
        return warning("completions", f"{there} is not what this tako would write", mend)
    return well("completions", f"{shell}, {there}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
