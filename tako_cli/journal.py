"""The log of an app on its servers: what systemd's journal has of its units, as the events that they are.

A server's lines come in the order of its own journal; those of several are merged by their times. A link that breaks is
made anew, and goes on after the last line that was seen.
"""

import heapq
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tako_cli.deploy.facts import slug
from tako_cli.remote import LinkLost, Remote, Unreachable
from tako_runtime import clock
from tako_runtime.config import Config
from tako_runtime.errors import TakoError

Event = dict[str, Any]

#: journalctl of the app's units, those of the user's own manager where it is not root's; what follows are options.
_JOURNAL = """
pattern=$1; shift
if [ "$(id -u)" = 0 ]; then kind=--unit; else kind=--user-unit; fi
exec journalctl "$kind" "$pattern" --output=json --no-pager --quiet "$@"
"""

#: How long a line of one server is held for those of the others that are older, and between two tries to connect again.
_HOLD = 0.5
_PAUSE, _LONGEST_PAUSE = 1.0, 15.0


class Line(NamedTuple):
    """One entry of a journal. `at` is when it came in there, in microseconds; `cursor` is its place there."""

    at: int
    server: str
    cursor: str
    event: Event


class Asked(NamedTuple):
    """What is wanted of each journal: since an instant, the newest so many, of the run with this id or a part of it."""

    since: int | None = None
    newest: int | None = None
    run: str | None = None


def words(config: Config, env: str, asked: Asked, *, after: str = "", follow: bool = False) -> list[str]:
    """The command that prints a server's journal."""
    told = [f"--after-cursor={after}"] if after else []
    if not after and asked.since is not None:
        told.append(f"--since=@{asked.since / clock.SECOND:.6f}")
    if not after and asked.newest is not None and asked.run is None:
        told.append(f"--lines={asked.newest}")
    elif follow:
        told.append("--lines=all")
    told += ["--follow"] if follow else []
    return ["sh", "-c", _JOURNAL, "journal", f"tako-{slug(config, env)}@*.service", *told]


def read(server: str, text: str) -> Line | None:
    """One entry as journalctl writes it; None for what is none."""
    try:
        entry = json.loads(text)
        at = int(entry["__REALTIME_TIMESTAMP"])
    except (ValueError, KeyError, TypeError):
        return None
    said = entry.get("MESSAGE", "")
    if isinstance(said, list):  # so the journal has bytes that are no text
        said = bytes(said).decode(errors="replace")
    said = str(said or "")
    try:
        event = json.loads(said)
        ours = isinstance(event, dict) and all(isinstance(event.get(key), str) for key in ("at", "event", "message"))
    except ValueError:
        ours = False
    if not ours:  # of systemd itself, or of a process that died before it could write a log
        level = "info" if int(entry.get("PRIORITY", 6)) > 4 else "error"
        event = {"at": clock.iso(at), "level": level, "event": "output", "message": said, "source": "systemd"}
    event.setdefault("source", "tako")
    return Line(at, server, str(entry.get("__CURSOR", "")), event)


def history(config: Config, env: str, remotes: Sequence[Remote], asked: Asked) -> Iterator[Line]:
    """What the journals have, in the order of time. Raises `Unreachable` for the first server that is."""
    yield from heapq.merge(*(_entries(config, env, remote, asked) for remote in remotes), key=lambda line: line.at)


def follow(
    config: Config,
    env: str,
    remotes: Sequence[Remote],
    asked: Asked,
    cursors: dict[str, str],
    note: Callable[[str], None],
) -> Iterator[Line]:
    """What comes after those cursors, for ever; without one, from now on. `note` is told of links that break, and that
    are there again."""
    heard: queue.SimpleQueue[Line | str | TakoError] = queue.SimpleQueue()
    for remote in remotes:
        told = (config, env, remote, asked, cursors.get(remote.name, ""), heard)
        threading.Thread(target=_listen, args=told, daemon=True).start()
    held: list[tuple[int, int, Line]] = []
    count = 0
    while True:
        try:
            item = heard.get(timeout=_HOLD if held and len(remotes) > 1 else None)
        except queue.Empty:
            item = ""
        if isinstance(item, TakoError):
            raise item
        if isinstance(item, Line):
            count += 1
            heapq.heappush(held, (item.at, count, item))
            if len(remotes) > 1:  # others may have older ones
                continue
        elif item:
            note(item)
        while held:
            yield heapq.heappop(held)[2]


def _listen(
    config: Config,
    env: str,
    remote: Remote,
    asked: Asked,
    cursor: str,
    heard: "queue.SimpleQueue[Line | str | TakoError]",
) -> None:
    """Follow one server's journal, in a thread."""
    pause, lost = _PAUSE, False
    while True:
        try:
            remote.connect()
            if lost:
                heard.put(f"{remote.name}: the connection is there again")
                pause, lost = _PAUSE, False
            if not cursor:
                asked = asked._replace(newest=0)
            for line in _entries(config, env, remote, asked, after=cursor, follow=True):
                cursor = line.cursor or cursor
                heard.put(line)
            raise LinkLost(f"{remote.name}: its journal ended")
        except Unreachable as error:
            if not lost:
                heard.put(f"{error}. It is tried again until it is there.")
            lost = True
            threading.Event().wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        except TakoError as error:
            heard.put(error)
            return


def _entries(
    config: Config, env: str, remote: Remote, asked: Asked, *, after: str = "", follow: bool = False
) -> Iterator[Line]:
    for text in remote.lines(words(config, env, asked, after=after, follow=follow)):
        line = read(remote.name, text)
        if line is not None and (asked.run is None or _is_of(line.event, asked.run)):
            yield line


def _is_of(event: Event, run: str) -> bool:
    """Whether it is about the run whose id is, begins or ends so."""
    told = str(event.get("run", ""))
    return told.startswith(run) or told.endswith(run)
