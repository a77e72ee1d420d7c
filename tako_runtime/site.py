"""An app where it runs: what an operator may ask of the store (`Control`), and what only that machine and that release
know beside it. Values in, values out.

    python -m tako_runtime operate      in the folder of a release: the same, as JSON over a pipe

`answer` is the whole of that: a request is a line with the name of an operation and what it is given, an answer is a
line. The annotations of the operations say how a value travels, in both directions. Nothing is formatted here.
"""

import asyncio
import contextlib
import inspect
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from tako_runtime import errors, feed, inflight, rotation, store, timetable
from tako_runtime.config import Config
from tako_runtime.control import Control, Json
from tako_runtime.errors import NotFound, TakoError
from tako_runtime.feed import Event, Supervising
from tako_runtime.manifest import Manifest, Mistake
from tako_runtime.run import Run, ScheduleRecord
from tako_runtime.store import Home, Limits
from tako_runtime.store.base import ListSchedules
from tako_runtime.store.commit import StoreThread


class Schedules(msgspec.Struct, frozen=True):
    """The schedules of an app, the runs of their last firings by id, what could not be imported, and which of them are
    this machine's own."""

    records: list[ScheduleRecord]
    runs: dict[str, Run]
    mistakes: tuple[Mistake, ...] = ()
    local: frozenset[str] = frozenset()


class Site(Control):
    """One app on this machine. `declared` reads what its code declares; `config` is its tako.toml, where that is known
    here, and `server` the name there of this machine.

    `where` it is is how people say it, and `at` how the next command that they type does."""

    where, at = "here", ""

    def __init__(
        self,
        opened: StoreThread,
        home: Home,
        declared: Callable[[], Manifest],
        config: Config | None = None,
        server: str | None = None,
    ) -> None:
        super().__init__(opened, app_dir=home.app_dir, local=store.local_of(home))
        self._opened, self._home, self._declared = opened, home, declared
        self._config, self._server = config, server

    @property
    def development(self) -> bool:
        """Whether it is a project's own, which `tako dev` works for, and not a server's."""
        return self._home.data_dir.name == ".tako"

    def status(self, config: Config | None = None, server: str | None = None) -> Json:
        beside = self._local is not None and self._local.there() is not None
        own = str(self._home.file) if beside else None
        at = {"app": self._home.app, "store": store.where(self._home), "local_store": own}
        return {**at, **super().status(config or self._config, server or self._server)}

    def why(self, prefix: str, config: Config | None = None, declared: Callable[[], Manifest] | None = None) -> Json:
        config = config or self._config
        return super().why(prefix, config, declared or (self._declared if config else None))

    def place(self, run: Run) -> str:
        """Where its worker is in a run: "in step charge"; "" where nobody knows."""
        return inflight.places(self._home.app_dir, run.worker)(run.seq).where if run.worker else ""

    def folder(self, release: str) -> Path:
        """Where the code of a release is, or was."""
        here = Path.cwd()
        return here if self.development else here.parent / release

    def root(self) -> Path:
        """Where its code is."""
        return self._config.root if self._config is not None else Path.cwd()

    def now(self) -> int:
        """The time there."""
        return self._clock.now()

    def who(self) -> Supervising | None:
        """Who supervises it; None where nobody does."""
        return feed.supervising(self._home.app_dir)

    def limits(self) -> Limits:
        """Those of whatever is stored."""
        return store.limits()

    def manifest(self) -> Manifest:
        """What its code declares."""
        return self._declared()

    def schedules(self) -> Schedules:
        """Those of its supervisor; where none runs, those that the next one will have: what the code declares now."""
        stored = [(one, local) for opened, local in self._stores() for one in opened.do_sync(ListSchedules())]
        records, own = [one for one, _ in stored], {one.workflow for one, local in stored if local}
        mistakes: tuple[Mistake, ...] = ()
        if self.who() is None and (not records or self._config is not None):
            found = self._declared()
            records, mistakes = timetable.merged(found.workflows, records), found.mistakes
            own = {flow.name for flow in found.workflows if flow.local and self._local is not None}
        runs: dict[str, Run] = {}
        for opened, _ in self._stores():
            runs |= timetable.last_runs(opened, records)
        return Schedules(records, runs, mistakes, frozenset(own))

    def close(self) -> None:
        """Close what was opened beside the store that it was given."""
        if self._local is not None:
            self._local.close()

    def put_secrets(self, values: dict[str, str], roll: bool) -> Json:
        """Make these its secrets, all of them: `changed` are the names of those that are others now. With `roll`, its
        supervisor is told (`told`), and replaces who has the old ones at their next step."""
        changed, who = rotation.put(self._home.app_dir, values), self.who()
        told = roll and who is not None and bool(changed or rotation.standing(self._home.app_dir)["unread"])
        if told and who is not None:
            os.kill(who.pid, signal.SIGHUP)
        return {"changed": changed, "told": told, "running": who is not None}

    async def tail(self, run: str | None = None) -> AsyncIterator[Event]:
        """Events as they come: of the run with this id until it has ended, or of all runs for ever."""
        from tako_runtime.tail import tail  # no other operation needs it

        async for event in tail(self, self._opened.bell, self._home.app_dir, run):
            yield event


# --- from afar -------------------------------------------------------------------------------------------------------

#: What may be asked over a pipe.
OPERATIONS = frozenset(
    {
        "find", "list_runs", "show", "why", "status", "signals", "start", "retry", "cancel", "signal", "prunable",
        "prune", "wait", "place", "folder", "root", "now", "who", "limits", "manifest", "schedules", "tail",
        "put_secrets",
    }
)  # fmt: skip


#: The hint where what is asked for came with a later tako.
OLDER = "Deploy with the tako of here."


class Asked(msgspec.Struct, frozen=True):
    """One request."""

    ask: str
    given: dict[str, msgspec.Raw]


class Trouble(msgspec.Struct, frozen=True):
    """An error that travels: the name of its class, and what it says."""

    kind: str
    message: str
    hint: str


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of an answer. All but `event` end it."""

    answer: msgspec.Raw = msgspec.Raw(b"")
    event: Event | None = None
    trouble: Trouble | None = None


def asked(name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> bytes:
    """The line that asks for an operation with these arguments."""
    bound = inspect.signature(getattr(Site, name)).bind(None, *given, **named)
    told = {key: value for key, value in bound.arguments.items() if key != "self"}
    return msgspec.json.encode({"ask": name, "given": told}, enc_hook=str) + b"\n"


def answered(name: str, line: bytes) -> Any:
    """What an operation has answered, of the type that it has here. Raises what it has raised there."""
    answer = msgspec.json.decode(line, type=Answer)
    if answer.trouble is not None:
        kind = getattr(errors, answer.trouble.kind, TakoError)
        raise kind(answer.trouble.message, hint=answer.trouble.hint)
    if answer.event is not None:
        return answer.event
    if bytes(answer.answer) == b"null":  # of what has no value here: the end of a tail
        return None
    return msgspec.json.decode(answer.answer, type=_types(name)["return"], dec_hook=_built)


def answer(site: Site, lines: Iterable[bytes], say: Callable[[bytes], object]) -> None:
    """Answer requests until their end. `tail` goes on until its end, or until that of `lines`."""
    lines = iter(lines)
    for line in lines:
        try:
            request = msgspec.json.decode(line, type=Asked)
            if request.ask not in OPERATIONS:
                raise NotFound(f"the tako there knows no operation {request.ask!r}", hint=OLDER)
            types = _types(request.ask)
            if unknown := sorted(request.given.keys() - types.keys()):
                raise NotFound(f"the tako there knows no {unknown[0]!r} of operation {request.ask!r}", hint=OLDER)
            given = {
                name: msgspec.json.decode(value, type=types[name], dec_hook=_built)
                for name, value in request.given.items()
            }
            if request.ask == "tail":
                asyncio.run(_tell(site.tail(**given), lines, say))
                said = b"null"
            else:
                said = msgspec.json.encode(getattr(site, request.ask)(**given), enc_hook=str)
            say(msgspec.json.encode(Answer(msgspec.Raw(said))) + b"\n")
        except TakoError as error:
            trouble = Trouble(type(error).__name__, str(error), error.hint)
            say(msgspec.json.encode(Answer(trouble=trouble)) + b"\n")


async def _tell(events: AsyncIterator[Event], lines: Iterable[bytes], say: Callable[[bytes], object]) -> None:
    """Tell of events until their end, or until nobody listens any more."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()

    def listen() -> None:
        for _ in lines:
            pass
        with contextlib.suppress(RuntimeError):  # the loop is closed: all has been told
            loop.call_soon_threadsafe(gone.set)

    async def tell() -> None:
        async for event in events:
            say(msgspec.json.encode(Answer(event=event), enc_hook=str) + b"\n")

    threading.Thread(target=listen, daemon=True).start()
    telling, leaving = asyncio.ensure_future(tell()), asyncio.ensure_future(gone.wait())
    await asyncio.wait([telling, leaving], return_when=asyncio.FIRST_COMPLETED)
    for task in (telling, leaving):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await telling


def _types(name: str) -> dict[str, Any]:
    return get_type_hints(getattr(Site, name))


def _built(kind: type, text: Any) -> Any:
    """A value that travels as text: a path."""
    return kind(text)
