"""What a person has at the terminal of `tako dev` beside the log: the footer, and a key for what one does all day."""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tako_cli import output, wording
from tako_cli.dev.footer import Footer
from tako_cli.dev.lines import Event, Lines
from tako_cli.dev.questions import Choice, Line
from tako_cli.dev.screen import Screen
from tako_cli.dev.welcome import payload_file
from tako_cli.timeline import runs_table, short_id
from tako_runtime import clock
from tako_runtime.control import Control
from tako_runtime.errors import StoreBusy, StoreError, TakoError
from tako_runtime.store.base import PAUSE, DropLease, Paused, TakeLease

if TYPE_CHECKING:
    from tako_runtime.config import Config
    from tako_runtime.manifest import Declared
    from tako_runtime.server import Server
    from tako_runtime.store.commit import StoreThread

#: A pause lapses so soon after its `tako dev` has died, and is renewed so often, in seconds.
_PAUSE = 5 * clock.SECOND
_RENEWAL = 1.0

#: So many of the newest runs are listed, and so much of a payload is shown.
_LISTED, _SHOWN = 15, 60


class Board:
    """`async with board:` beside the server. `quit_()` is what `q` does, and what a defect of the board's comes to."""

    def __init__(
        self, config: "Config", server: "Server", store: "StoreThread", lines: Lines, quit_: Callable[[], None]
    ) -> None:
        self._config, self._server, self._store, self._lines, self._quit = config, server, store, lines, quit_
        self._control = Control(store, app_dir=server.home.app_dir, local=server.local)
        self._screen = Screen()
        self.footer = Footer(server.stores, self._screen.show)
        self._pausing: asyncio.Task[None] | None = None
        self._sent: dict[str, str] = {}  # the last payload of a kind of signal
        self._keys: dict[str, tuple[str, Callable[[], Awaitable[None]]]] = {
            "s": ("start a workflow", self._start),
            "r": ("reload: go on with the files as they are now", self._reload),
            "n": ("wake the run that sleeps and would wake next", self._wake),
            "w": ("send a signal that a run waits for", self._signal),
            "l": ("list the newest runs", self._list),
            "f": ("fire a schedule now", self._fire),
            "p": ("pause: claim nothing more; and go on", self._pause),
            "?": ("these keys", self._help),
        }

    async def __aenter__(self) -> "Board":
        self._screen.__enter__()
        self.footer.draw()
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(lambda ended: None if ended.cancelled() else self._quit())
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            self._running.cancel()
            [ended] = await asyncio.gather(self._running, return_exceptions=True)
            if isinstance(ended, Exception):
                raise ended
        finally:
            self._screen.__exit__(*error)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The terminal for somebody else, within (`Screen.lent`)."""
        with self._screen.lent():
            yield

    def heard(self, event: Event) -> None:
        """What the log gets too."""
        self.footer.heard(event)

    def stopping(self) -> None:
        """The session drains: no key but `q` does anything any more."""
        self.footer.stopping = True
        self._screen.leave_it()
        self.footer.draw()

    async def _run(self) -> None:
        """Until it is cancelled; then a pause has ended."""
        drawing = asyncio.create_task(self.footer.run())
        try:
            while True:
                key = await self._screen.key()
                if key == "q":
                    self._quit()
                elif key == "<enter>":
                    self._lines.banner([output.styled("")])  # a gap in the log, as at any terminal
                elif key in self._keys and not self.footer.stopping:
                    await self._do(self._keys[key][1])
        finally:
            drawing.cancel()
            if self._pausing is not None:
                with suppress(StoreError):  # it lapses
                    await self._go_on(self._pausing)

    async def _do(self, action: Callable[[], Awaitable[None]]) -> None:
        try:
            await action()
        except TakoError as error:
            self._lines.say("dev.refused", f"{error}. {error.hint}".rstrip(". "), "warning", hint=error.hint)
        self.footer.look_again()

    # --- the keys ---

    async def _start(self) -> None:
        flows = self._server.manifest.workflows
        flow = await self._chosen("start which workflow?", [(one.name, one.doc, one) for one in flows], "no workflow")
        if flow is None:
            return
        payload = "null"
        if flow.payload not in (None, "None", "NoneType"):
            begin, of = await asyncio.to_thread(self._last_payload, flow)
            payload = await self._screen.ask(Line(f"payload of {flow.name}{of}", begin, _no_json))
            if payload is None:
                return
        await asyncio.to_thread(self._control.refuse_unhealthy, flow.group)
        run = await asyncio.to_thread(self._control.start, flow, payload)
        self._lines.say("dev.started", f"started{_beside(payload)}", run=run.id, workflow=flow.name)

    def _last_payload(self, flow: "Declared") -> tuple[str, str]:
        """What to begin with, and what that is: the payload of the last run in this store, the project's own example,
        or one that is made from its type."""
        if last := self._control.list_runs(workflow=flow.name, limit=1):
            return json.dumps(last[0]["payload"], ensure_ascii=False), ", as the last time"
        if (file := payload_file(flow, self._config.root)) is not None:
            try:
                return json.dumps(json.loads(file.read_text("utf-8")), ensure_ascii=False), f", from {file.name}"
            except (OSError, ValueError):  # an example of something else
                pass
        return flow.example or "{}", f", a {flow.payload}" if flow.example else ""

    async def _reload(self) -> None:
        self._server.reload()

    async def _wake(self) -> None:
        run = await asyncio.to_thread(self._control.wake)
        self._lines.say("dev.woken", "woken: its sleep is over", run=run["id"], workflow=run["workflow"])

    async def _signal(self) -> None:
        waits = (await asyncio.to_thread(self._control.signals))["waiting"]
        now = wording.now()
        options = [
            (wait["signal"], f"{wait['workflow']} {short_id(wait['run'])}, for {wording.age(wait['since'], now)}", wait)
            for wait in waits
        ]
        wait = await self._chosen("send which signal?", options, "no run waits for a signal")
        if wait is None:
            return
        name = str(wait["signal"])
        kind = name.partition(":")[0]
        payload = await self._screen.ask(Line(f"payload of signal {name}", self._sent.get(kind, "null"), _no_json))
        if payload is None:
            return
        self._sent[kind] = payload
        woken = await asyncio.to_thread(self._control.signal, name, payload)
        took = f"taken by {woken} run{'s' * (woken != 1)}" if woken else "kept: nobody waits for it any more"
        self._lines.say("dev.signalled", f"signal {name}{_beside(payload)}: {took}")

    async def _list(self) -> None:
        runs = await asyncio.to_thread(self._control.list_runs, limit=_LISTED)
        none = [output.styled("no runs yet: press s to start one", "dim")]
        gap = output.styled("")
        self._lines.banner([gap, *(runs_table(runs, wording.now()) if runs else none), gap])

    async def _fire(self) -> None:
        flows = [flow for flow in self._server.manifest.workflows if flow.schedule is not None]
        options = [(flow.name, f"{flow.schedule} {flow.timezone or 'UTC'}", flow) for flow in flows]
        flow = await self._chosen("fire which schedule?", options, "no workflow has a schedule")
        if flow is not None:
            run = await asyncio.to_thread(self._control.start, flow, "null", scheduled_at=wording.now())
            self._lines.say("dev.fired", "fired by hand", run=run.id, workflow=flow.name)

    async def _help(self) -> None:
        quits = ("q", "quit, as Ctrl-C does; again: at once")
        keys = [*((key, does) for key, (does, _) in self._keys.items()), quits]
        gap = output.styled("")
        self._lines.banner(
            [gap, *(output.styled(f"  {key}  ", "bold").append(does, "not bold") for key, does in keys), gap]
        )

    async def _chosen(self, title: str, options: list[tuple[str, str, Any]], none: str) -> Any:
        """What was chosen of these; None where nothing was, or could be."""
        if options:
            return await self._screen.ask(Choice(title, options))
        self._lines.say("dev.refused", none, "warning")
        return None

    # --- the pause ---

    async def _pause(self) -> None:
        if self._pausing is not None:
            pausing, self._pausing = self._pausing, None
            await self._go_on(pausing)
            self._lines.say("dev.resumed", "runs are claimed again")
        elif not await self._hold():
            other = await self._store.do(Paused(now=wording.now()))
            self._lines.say("dev.refused", f"it is paused by {other} already", "warning")
            return
        else:
            self._pausing = asyncio.create_task(self._keep_holding())
            said = "paused: no run is claimed until p is pressed again; what runs goes on to its end or its next pause"
            self._lines.say("dev.paused", said, "warning")
        self.footer.paused = self._pausing is not None
        self.footer.draw()

    async def _hold(self) -> bool:
        now = wording.now()
        lease = TakeLease(name=PAUSE, holder=_name(), until=now + _PAUSE, now=now)
        held = [await store.do(lease) for store in self._server.stores()]
        return all(held)

    async def _keep_holding(self) -> None:
        while True:
            await asyncio.sleep(_RENEWAL)
            with suppress(StoreBusy):  # the next time
                await self._hold()

    async def _go_on(self, pausing: "asyncio.Task[None]") -> None:
        pausing.cancel()
        for store in self._server.stores():
            await store.do(DropLease(name=PAUSE, holder=_name()))


def _name() -> str:
    """Who pauses, for everybody who asks."""
    return f"tako dev, process {os.getpid()} on {socket.gethostname()}"


def _beside(payload: str) -> str:
    """As much of a payload as there is room for in a line."""
    if payload == "null":
        return ""
    return f" with {payload if len(payload) <= _SHOWN else payload[: _SHOWN - 1] + output.ellipsis()}"


def _no_json(text: str) -> str:
    try:
        json.loads(text)
    except ValueError as error:
        return f"that is no JSON: {error}"
    return ""
