"""What the supervisor and its workers announce, live, for whoever looks on: `tako runs tail`.

The supervisor listens on a stream socket that only its own user can connect to, and writes each event to each reader as
a JSON line. It never waits for one: a reader that falls far behind is dropped. That somebody listens there says that a
supervisor runs: the socket's end is its process's end, however that ends. And a command that has ended a run by itself
tells it here, so that the log and the metrics have all ends.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock, log
from tako_runtime.bell import socket_folder
from tako_runtime.clock import REAL_TIME, Pace
from tako_runtime.masking import masked_json

Event = dict[str, Any]

#: How a `tako dev` whose time passes faster calls itself: "tako dev --time-scale 3600".
SCALED = " --time-scale "

#: How many bytes a reader may be behind before it is dropped.
MOST_BEHIND = 4 << 20

#: How long the end of the supervisor waits for its readers, in seconds.
PARTING = 1.0

#: How long a supervisor has to answer, in seconds.
ANSWER = 1.0

_PART = 1 << 16

#: What a command may tell of.
_TOLD = frozenset({"run.cancelled"})

#: The longest line that a reader takes: an event may carry a whole traceback.
LONGEST_LINE = 16 << 20


class Feed:
    """The supervisor's side: `async with feed` in its event loop. Events may be published from any thread;
    `heard(event)` gets what a command tells."""

    def __init__(self, app_dir: Path, heard: Callable[[Event], None] = lambda _: None) -> None:
        self._path, self._heard = _path(app_dir), heard
        self._readers: dict[asyncio.StreamWriter, asyncio.Task[Any] | None] = {}
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> "Feed":
        self._loop = asyncio.get_running_loop()
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._server = await asyncio.start_unix_server(self._welcome, self._path)
            self._path.chmod(0o600)
        except OSError as error:  # the work is worth more than its onlookers
            log.emit("feed.missing", path=str(self._path), error=str(error))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is None:
            return
        self._server.close()
        self._path.unlink(missing_ok=True)
        left = dict(self._readers)
        for reader in left:
            reader.close()  # once it has what is on its way to it
        if left:
            await asyncio.wait([task for task in left.values() if task], timeout=PARTING)
        for reader in left:
            reader.transport.abort()

    def publish(self, source: str, event: Event) -> None:
        """An event of a worker's group, or of the supervisor itself ("tako"). Costs nothing where nobody reads."""
        if self._readers and self._loop is not None:
            line = msgspec.json.encode({**event, "source": source}, enc_hook=str) + b"\n"
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._send, line)

    def announce(self, line: Event) -> None:
        """A sink of `log`: what is announced in this process."""
        if self._readers:
            self.publish("tako", log.told(line))

    def _send(self, line: bytes) -> None:
        for reader in list(self._readers):
            if reader.transport.get_write_buffer_size() > MOST_BEHIND:
                del self._readers[reader]
                reader.transport.abort()
            else:
                reader.write(line)

    async def _welcome(self, words: asyncio.StreamReader, reader: asyncio.StreamWriter) -> None:
        """Until it leaves. An empty line tells it that it hears all from now on."""
        self._readers[reader] = asyncio.current_task()
        reader.write(b"\n")
        try:
            with contextlib.suppress(OSError, ValueError):  # it is gone; or it says too much at once
                while line := await words.readline():
                    self._take(line)
        finally:
            self._readers.pop(reader, None)
            reader.close()

    def _take(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(masked_json(line, "what a command says"))
        except msgspec.MsgspecError:
            return
        names = ("at", "level", "event", "message")
        known = isinstance(event, dict) and all(isinstance(event.get(name), str) for name in names)
        if known and event["event"] in _TOLD:
            self._heard(event)


class Follower:
    """One who looks on, within an event loop."""

    def __init__(self, lines: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines, self._writer = lines, writer

    async def next(self) -> Event | None:
        """The next event; None once the supervisor has gone, or has dropped us for being slow."""
        try:
            line = await self._lines.readline()
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        event: Event = msgspec.json.decode(line)
        return event

    def close(self) -> None:
        self._writer.close()


async def follow(app_dir: Path) -> Follower | None:
    """Look on: what is announced after this has returned is heard. None where no supervisor runs here, or none that
    answers."""
    try:
        async with asyncio.timeout(ANSWER):
            lines, writer = await asyncio.open_unix_connection(_path(app_dir), limit=LONGEST_LINE)
            try:
                if await lines.readline() == b"\n":
                    return Follower(lines, writer)
            except BaseException:
                writer.close()
                raise
            writer.close()
    except OSError:  # a TimeoutError is one
        pass
    return None


def tell(app_dir: Path, event: str, **facts: Any) -> None:
    """Tell the supervisor that runs here, if one does, what this command has done."""
    line = log.told({"at": clock.SystemClock().now(), "level": log.WORDS[event][0], "event": event, **facts})
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as telling,
    ):
        telling.settimeout(ANSWER)
        telling.connect(str(_path(app_dir)))
        telling.sendall(msgspec.json.encode(line) + b"\n")
        telling.shutdown(socket.SHUT_WR)
        while telling.recv(_PART):  # until it has taken that: who leaves with something unread is cut off
            pass


class Supervising(msgspec.Struct, frozen=True):
    """Who supervises an app on this machine: "tako dev" or "supervisor"; the former may say at which time scale."""

    pid: int
    what: str

    @property
    def pace(self) -> Pace:
        """How fast durable time passes under it."""
        scale = self.what.partition(SCALED)[2]
        return Pace(float(scale)) if scale else REAL_TIME


def supervising(app_dir: Path) -> Supervising | None:
    """Who supervises the app here; None where nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(ANSWER)
        try:
            probe.connect(str(_path(app_dir)))
        except TimeoutError:  # it is there, and too busy to answer
            pass
        except OSError:
            return None
    with contextlib.suppress(OSError, ValueError):
        pid, _, what = (app_dir / "supervisor.pid").read_text().partition(" ")
        return Supervising(int(pid), what)
    return None


def _path(app_dir: Path) -> Path:
    return socket_folder(app_dir / "feed") / "socket"
