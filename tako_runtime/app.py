"""The app's own process, `[app] command`, next to the workers: started, looked at, started again when it ends, stopped.

`{fd}` in its words is the number of a socket that listens already, and stays open while the app is started anew: nobody
who connects meanwhile is turned away. `{port}` is where it is to listen by itself; PORT says that in any case.
"""

import asyncio
import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock, guard, port
from tako_runtime.child import printed
from tako_runtime.clock import Clock, SystemClock
from tako_runtime.config import Config
from tako_runtime.errors import ConfigError, Refused, TakoError
from tako_runtime.log import INFO, emit, words
from tako_runtime.masking import masked, masked_json
from tako_runtime.process import Process, how, last
from tako_runtime.rotation import Mark
from tako_runtime.secrets import VARIABLE, offered

#: The pause after an end; doubled with each one, up to the longest. Who was well for so long begins anew.
FIRST_PAUSE = clock.SECOND
LONGEST_PAUSE = clock.MINUTE

#: How often an app that answers is looked at, and how long one look may take, in seconds.
LOOK = 10.0
ANSWER = 5.0

#: One that starts is looked at after these pauses, which grow from the first to the last.
FIRST_LOOK, LAST_LOOK = 0.05, 1.0

#: How often whoever waits for its proof looks, in seconds.
_PROOF = 0.05

#: An app that has not answered for so long after its start is told of, in seconds.
LATE = 30.0

#: States without a process.
_OVER = frozenset({"ended", "failed", "stopped"})

Event = dict[str, Any]


class Noted:
    """How the app stands, in a file beside the store, for commands that ask: the last that was said of it. A sink of
    `log`; it is true as long as its supervisor lives."""

    least = INFO

    def __init__(self, app_dir: Path) -> None:
        self._file = app_dir / "app.json"
        self._known: dict[str, Any] = {}
        self._file.unlink(missing_ok=True)  # what the one before has left

    def __call__(self, line: Event) -> None:
        if not line["event"].startswith("app."):
            return
        state = line["event"].removeprefix("app.")
        if state in _OVER:
            self._known.clear()
        self._known |= {name: line[name] for name in ("pid", "url") if name in line and state not in _OVER}
        said = {"state": state, "since": clock.iso(line["at"]), "message": words(line), "pid": None, "url": None}
        fresh = self._file.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk: the log has it
            with open(fresh, "wb", opener=_private) as file:
                file.write(msgspec.json.encode(said | self._known))
            fresh.replace(self._file)


def standing(app_dir: Path) -> dict[str, Any] | None:
    """How the app stands (`state`, `since`, `message`, `pid`, `url`); None where nothing was said of one."""
    try:
        return msgspec.json.decode((app_dir / "app.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


class App:
    """The app of one project on this machine, until stopped. `show(event)` gets each line that it prints; `secrets()`
    are those that it gets when it is started, and `mark(what)` makes the mark of who gets them. `passed_on` is a socket
    that listens for it already."""

    def __init__(
        self,
        config: Config,
        environment: Mapping[str, str],
        show: Callable[[Event], None],
        *,
        secrets: Callable[[], Mapping[str, str]],
        mark: Callable[[str], Mark],
        passed_on: socket.socket | None = None,
        look: float = LOOK,
        late: float = LATE,
        clock: Clock | None = None,
    ) -> None:
        assert config.app is not None
        self._config, self._root, self._grace = config.app, config.root, config.workflows.grace
        self._show, self._secrets, self._mark = show, secrets, mark
        self._look_every, self._late = look, late
        self._clock: Clock = clock or SystemClock()
        self._socket = passed_on
        self.takes_socket = any("{fd}" in word for word in self._config.command)
        if passed_on is not None and not self.takes_socket:
            raise ConfigError(
                "the service manager passes a socket on, and [app] command does not take it",
                hint="Put {fd} where the command names the descriptor to listen on, or leave the socket unit out.",
            )
        self._environment = self._own(environment)
        self._process: Process | None = None
        self._failures = 0
        self._why = ""  # it does not answer, or has ended
        self._well_since: float | None = None
        self._stopping, self._renew, self._wake = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def _own(self, environment: Mapping[str, str]) -> dict[str, str]:
        return {
            **environment, "PORT": str(self._port()), "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]),
        }  # fmt: skip

    @property
    def url(self) -> str:
        """Where it answers."""
        at = self._socket.getsockname() if self._socket is not None else None
        return f"unix:{at}" if isinstance(at, str) else f"http://{self._hosts()[0]}:{self._port()}"

    def bind(self) -> None:
        """Take the port, or see that the app can. Raises `Refused`, which says who has it."""
        command = " ".join(self._config.command)
        if self._socket is None and ("{fd}" in command or "{port}" in command or self._config.health is not None):
            listening = port.bound(self._config.port)
            if self.takes_socket:
                self._socket = listening
            else:
                listening.close()

    async def proved(self, stable: float, patience: float) -> None:
        """Once it answers (without a health path: once it is started) and has done so for `stable` seconds. Raises
        `Refused` if it ends before that, or does not answer within `patience` seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while self._well_since is None or loop.time() - self._well_since < stable:
            if self._failures:
                raise Refused(self._why)
            if loop.time() > until:
                raise Refused(f"the app does not answer 200 within {patience:g} s: {self._why or 'it is not started'}")
            await asyncio.sleep(_PROOF)

    async def unwell(self) -> str:
        """Once it has ended or does not answer any more: why."""
        while self._well_since is not None:
            await asyncio.sleep(_PROOF)
        return self._why

    async def run(self) -> None:
        """Keep it running until `stop()`; then end it, and leave nothing of it behind."""
        try:
            while not self._stopping.is_set():
                await self._live()
                if not (self._stopping.is_set() or self._renew.is_set()):
                    await self._sleep(self._pause() / clock.SECOND)
        finally:
            self.kill()
            if self._socket is not None:
                self._socket.close()

    def stop(self) -> None:
        """SIGTERM, its grace, then SIGKILL. Call it in the event loop."""
        self._stopping.set()
        self._wake.set()

    def try_now(self) -> None:
        """Somebody may have mended what it failed of: no pause holds it up."""
        self._failures = 0
        self._wake.set()

    def restart(self, environment: Mapping[str, str]) -> None:
        """Its code or its variables are others now: end it as at a stop, and start it again."""
        self._environment = self._own(environment)
        self._renew.set()
        self.try_now()

    def kill(self) -> None:
        """End it at once, with all that it has started."""
        if self._process is not None:
            self._process.kill()

    # --- one life ---

    async def _live(self) -> None:
        """From its start to its end."""
        loop = asyncio.get_running_loop()
        self._well_since = None
        self._renew.clear()
        try:
            process = self._process = await self._start()
        except (TakoError, OSError) as error:
            self._failures += 1
            self._why = f"the app cannot be started: {error}"
            hint = getattr(error, "hint", "")
            emit("app.failed", error=f"{error}. {hint}".rstrip(". "), pause=clock.spell(self._pause()))
            return
        emit("app.started", pid=process.pid, command=" ".join(self._words()))
        if self._config.health is None:
            self._well_since = loop.time()
        following = loop.create_task(process.follow_lines(lambda line: self._heard(process, line)))
        looking = loop.create_task(self._look(self._config.health, loop.time())) if self._config.health else None
        stopping, renewing = loop.create_task(self._stopping.wait()), loop.create_task(self._renew.wait())
        await asyncio.wait([following, stopping, renewing], return_when=asyncio.FIRST_COMPLETED)
        for task in (looking, stopping, renewing):
            if task is not None:
                task.cancel()
        if not following.done():
            process.terminate()
            await asyncio.wait([following], timeout=self._grace / clock.SECOND)
            process.kill()
        code = await following
        self._process = None
        if self._stopping.is_set():
            emit("app.stopped", pid=process.pid, how=how(code))
            return
        if self._renew.is_set():
            return
        well = self._well_since is not None and loop.time() - self._well_since >= LONGEST_PAUSE / clock.SECOND
        self._failures = 1 if well else self._failures + 1
        self._why, self._well_since = f"the app ended ({how(code)})", None
        emit(
            "app.ended", pid=process.pid, how=how(code), pause=clock.spell(self._pause()),
            last_lines=last(process.last_lines),
        )  # fmt: skip

    async def _start(self) -> Process:
        self.bind()
        given = [self._socket.fileno()] if self._socket is not None else []
        words = [sys.executable, "-I", "-S", guard.__file__, *self._words()]
        mark = self._mark("the app")
        try:
            with offered(self._secrets()) as (envelope, said):
                environment = {**self._environment, VARIABLE: said}
                process = Process(words, self._root, environment, [envelope, *mark.given, *given])
            mark.of(process.pid)
        finally:
            mark.drop()
        return process

    def _words(self) -> list[str]:
        """Its command, filled in. Braces that mean something else stay."""
        fd = self._socket.fileno() if self._socket is not None else -1
        return [word.replace("{fd}", str(fd)).replace("{port}", str(self._port())) for word in self._config.command]

    def _heard(self, process: Process, line: bytes) -> None:
        text = masked_json(line, "what the app says").decode(errors="replace").rstrip("\r")
        process.last_lines.append(text)
        self._show(printed(text, self._clock))

    def _pause(self) -> int:
        return min(FIRST_PAUSE << min(max(self._failures - 1, 0), 10), LONGEST_PAUSE)

    async def _sleep(self, seconds: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    # --- its health ---

    async def _look(self, path: str, started: float) -> None:
        """Until it answers, and then now and then. It is told of, not ended: whether a start would mend an app that
        runs and does not answer, nobody knows."""
        loop = asyncio.get_running_loop()
        pause, told = FIRST_LOOK, False
        while True:
            failure = self._why = await self._asked(path)
            if not failure:
                if self._well_since is None:
                    self._well_since = loop.time()
                    emit("app.healthy", url=self.url + path, ms=round((loop.time() - started) * 1_000, 1))
                told, pause = False, self._look_every
            elif self._well_since is not None:
                self._well_since, told, pause = None, True, FIRST_LOOK
                started = loop.time()
                emit("app.unhealthy", url=self.url + path, error=failure)
            elif not told and loop.time() - started >= self._late:
                told = True
                emit("app.late", url=self.url + path, seconds=round(loop.time() - started), error=failure)
            await asyncio.sleep(pause)
            if self._well_since is None:
                pause = min(pause * 1.5, LAST_LOOK)

    async def _asked(self, path: str) -> str:
        """Why it does not answer 200; "" where it does."""
        try:
            async with asyncio.timeout(ANSWER):
                reader, writer = await self._connected()
                try:
                    words = [f"GET {path} HTTP/1.1", "Host: localhost", "User-Agent: tako", "Connection: close", "", ""]
                    writer.write("\r\n".join(words).encode())
                    said = await reader.readline()
                finally:
                    writer.close()
        except TimeoutError:
            return f"no answer within {ANSWER:g} s"
        except OSError as error:
            return error.strerror or str(error)
        except ValueError:  # a line without end
            said = b""
        answer = re.match(rb"HTTP/1\.[01] (\d{3})\b", said)
        if answer is None:
            return masked(f"no HTTP: {said[:80]!r}" if said else "it closes the connection", "what the app says")
        return "" if answer[1] == b"200" else f"it answers {answer[1].decode()}"

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        at = self._socket.getsockname() if self._socket is not None else None
        if isinstance(at, str | bytes):
            return await asyncio.open_unix_connection(os.fsdecode(at))
        refused: OSError | None = None
        for host in self._hosts():
            try:
                return await asyncio.open_connection(host, self._port())
            except OSError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _port(self) -> int:
        at = self._socket.getsockname() if self._socket is not None else None
        return at[1] if isinstance(at, tuple) else self._config.port

    def _hosts(self) -> tuple[str, ...]:
        """Where it is from here: an app that binds by itself may do so on either loopback."""
        if self._socket is None or not isinstance(at := self._socket.getsockname(), tuple):
            return port.HOST, "::1"
        anywhere = {"0.0.0.0": port.HOST, "::": "::1"}  # noqa: S104 -- not bound here, only looked at
        host = str(at[0])
        return (anywhere.get(host, host),)
