"""One `tako dev`, from its first line to its last child's end.

lock -> store -> the app's port -> give back what a crash left
     -> supervise until Ctrl-C (or, with --once, until nothing is left)
"""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tako_cli import context, output, wording
from tako_cli.dev import screen
from tako_cli.dev.board import Board
from tako_cli.dev.lines import Event, Lines
from tako_cli.dev.once import Workable, work_off
from tako_cli.dev.watch import Watch
from tako_cli.dev.welcome import Found, spelled, welcome
from tako_runtime import log, store
from tako_runtime.child import TERMINAL
from tako_runtime.clock import REAL_TIME, Pace
from tako_runtime.errors import TakoError
from tako_runtime.feed import SCALED
from tako_runtime.masking import guarded
from tako_runtime.reclaim import reclaim
from tako_runtime.run import Status
from tako_runtime.secrets import reserve
from tako_runtime.server import Server, alone
from tako_runtime.store.base import CountRuns
from tako_runtime.store.commit import StoreThread

if TYPE_CHECKING:
    from tako_runtime.config import Config
    from tako_runtime.manifest import Manifest
    from tako_runtime.store.file import Aside


@dataclass(frozen=True, slots=True)
class Options:
    """How this `tako dev` was asked for. `read()` is the project's config, as it is by then; `shell` are the variables
    that win over it."""

    read: "Callable[[], Config]"
    shell: Mapping[str, str]
    once: bool = False
    fresh: bool = False
    process: bool = False
    plain: bool = False
    verbose: bool = False
    as_json: bool = False
    pace: Pace = REAL_TIME


def develop(config: "Config", manifest: "Manifest", options: Options) -> int:
    """Run the project here until told to stop; the exit code."""
    reserve()
    home = store.project_home(config.name, config.root, config.storage.url)
    with alone(home.app_dir, "tako dev" if options.pace.scale == 1 else f"tako dev{SCALED}{options.pace}"):
        secrets = context.secrets(config, home)
        aside = store.set_aside(home) if options.fresh else None
        opened = store.open_store(home)
        try:
            with guarded(secrets):
                session = Session(config, manifest, home, opened, options, secrets)
                if screen.is_there() and not (options.once or options.as_json or options.plain):
                    session.attend()
                session.aside = aside
                return asyncio.run(session.run())
        finally:
            opened.close()


class Session:
    """The supervisor of one project at a terminal. Make and run it in its event loop."""

    def __init__(
        self,
        config: "Config",
        manifest: "Manifest",
        home: store.Home,
        opened: StoreThread,
        options: Options,
        secrets: dict[str, str],
    ) -> None:
        self._config, self._manifest, self._home, self._store = config, manifest, home, opened
        self._options = options
        self._lines = Lines(
            config.root,
            [*(["app"] if config.app else []),
             *sorted({*config.group_names(), *(flow.group for flow in manifest.workflows)})],
            [flow.name for flow in manifest.workflows], as_json=options.as_json, lost=self._stop,
            verbose=options.verbose,
        )  # fmt: skip
        environment = self._environment()
        self._server = Server(
            opened, home, config, self._heard, log_level="debug", environment=environment,
            secrets=secrets, together=not (options.process or options.once), pace=options.pace,
        )  # fmt: skip
        self._watch: Watch | None = None
        self._broken: set[str] = set()
        self._board: Board | None = None  # where there is a person at the terminal
        self._debugging = ExitStack()  # while a debugger has the terminal
        self.aside: Aside | None = None  # the store that was put aside
        self._news = asyncio.Event()
        self._stops = 0
        self._dead = False
        self._failed_starts: dict[str, int] = {}

    def attend(self) -> None:
        """There is a person at the terminal, who gets a footer and keys."""
        self._board = Board(self._config, self._server, self._store, self._lines, self._interrupted)

    async def run(self) -> int:
        """Until Ctrl-C, or with `once` until nothing is left; the exit code."""
        loop, once = asyncio.get_running_loop(), self._options.once
        loop.add_signal_handler(signal.SIGINT, self._interrupted)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._told_to_end)
        if self._server.app is not None:
            self._server.app.bind()  # or say who has its port, before anything starts
        given_back: list[Event] = []
        with log.sink(given_back.append):
            await reclaim(self._store, self._home.app_dir, wording.now(), pace=self._options.pace)
        await self._server.take(self._manifest)
        await self._welcome()
        for event in given_back:
            self._announced(event)
        with log.sink(self._announced):
            self._server.look_at_secrets()
            beside = loop.create_task(self._work_off() if once else self._reload_what_is_saved())
            try:
                async with self._board or nullcontext():
                    await self._server.run(firing=not once)  # to work off is not to start more
            finally:
                beside.cancel()  # where it has ended, this does nothing
                [left] = await asyncio.gather(beside, return_exceptions=True)
            if isinstance(left, Exception):
                raise left
        await self._farewell()
        self._server.close()
        if self._stops > 1 or (once and self._stops):
            return 130
        return 1 if once and (self._dead or left is not True) else 0

    # --- what happens ---

    def _heard(self, source: str, event: Event) -> None:
        """From a worker."""
        if event["event"] == "worker.started":
            self._failed_starts.pop(source, None)
        self._dead = self._dead or event["event"] == "run.dead"
        if event["event"] == "debugger.opened":
            self._lines.show(source, event)
            self._lines.hold()
            if self._board is not None:
                self._debugging.enter_context(self._board.lent())
            self._server.cleared(int(event["pid"]))
            return
        if event["event"] == "debugger.closed":
            self._debugging.close()
            self._lines.go_on()
        if event["event"] == "file.broken":
            self._broken.add(str(event.get("file")))
            self._know()
        self._lines.show(source, event)
        self._happened(event)

    def _announced(self, event: Event) -> None:
        """From the supervisor, in this process."""
        if event["event"] == "group.paused":
            self._failed_starts[event["group"]] = event["failures"]
        self._dead = self._dead or (event["event"] == "run.reclaimed" and event["then"] == Status.DEAD)
        if event["event"] == "code.declared":
            self._lines.mended()
            self._broken = {mistake.file for mistake in self._server.manifest.mistakes}
            self._know()
        self._lines.of_supervisor(event)
        self._happened(event)

    def _happened(self, event: Event) -> None:
        if self._board is not None:
            self._board.heard(event)
        self._news.set()

    async def _reload_what_is_saved(self) -> None:
        folder = self._config.root / self._config.workflows.dir
        self._watch = Watch(self._config.root, self._config.path, folder, self._saved)
        self._know()
        await self._watch.run()

    def _saved(self, files: list[Path]) -> None:
        if self._config.path not in files:
            self._broken.clear()
            self._server.reload()
            return
        try:
            config = self._options.read()
        except TakoError as error:
            self._lines.say("config.broken", f"{error}: what was in it before holds", "error", hint=error.hint)
            return
        before, now = _fixed(self._config), _fixed(config)
        if later := [name for name in now if now[name] != before[name]]:
            self._lines.say("config.later", f"{', '.join(later)} in tako.toml: from the next tako dev on", "warning")
        self._config = config
        self._server.configure(config, self._environment())

    def _environment(self) -> dict[str, str]:
        found = context.environment(self._config, self._home, self._options.shell)
        if sys.stdin.isatty() and sys.stdout.isatty() and not self._options.process:
            found[TERMINAL] = os.ttyname(sys.stdin.fileno())
        return found

    def _know(self) -> None:
        """What the code at work is made of."""
        if self._watch is not None:
            root = self._config.root
            self._watch.know([root / file for file in self._server.manifest.files], map(Path, self._broken))

    def _interrupted(self) -> None:
        self._stops += 1
        if self._stops == 1:
            if self._board is not None:
                self._board.stopping()
            self._lines.say("dev.stopping", "stopping: runs go on to their next step boundary. Again: stop at once")
            self._stop()
            return
        self._server.kill()

    def _told_to_end(self) -> None:
        """By a program, which may say it to this process and to its whole group: twice is as good as once."""
        if self._stops == 0:
            self._interrupted()

    def _stop(self) -> None:
        self._server.stop()

    async def _work_off(self) -> bool:
        declared = {(flow.name, flow.group) for flow in self._manifest.workflows}
        try:
            return await work_off(
                self._server.stores, Workable(declared, self._failed_starts), self._news, self._lines.say
            )
        finally:
            self._stop()

    # --- the first and the last lines ---

    async def _welcome(self) -> None:
        left, config = await self._left(), self._config
        given = self._server.secrets
        found = Found(
            app=config.name, url=self._server.app.url if self._server.app is not None else None, root=config.root,
            folder=config.workflows.dir, store=Path(store.where(self._home)), workflows=self._manifest.workflows,
            secrets=sorted(given), missing=[name for name in config.secrets.required if name not in given], left=left,
            keys=self._board is not None,
        )  # fmt: skip
        self._lines.banner([*welcome(found), output.styled("")])
        for one in self._manifest.mistakes:
            message = f"{context.place(one.file, one.line)}: {one.message}"
            self._lines.say("file.broken", message, "error", file=one.file, line=one.line, error=one.message)
            self._broken.add(one.file)
        self._lines.say(
            "dev.ready", f"{config.name} is ready", app=config.name, store=str(found.store), pid=os.getpid(),
            workflows=[flow.name for flow in found.workflows], left=left, url=found.url, secrets=found.secrets,
            missing=found.missing,
        )  # fmt: skip
        if (pace := self._options.pace).scale != 1:
            scaled = (
                f"sleeps, waits, retries, delays and schedules pass {pace} times faster; code, its timeouts and the "
                "times shown here are those of the clock"
            )
            self._lines.say("dev.scaled", scaled, "warning", time_scale=pace.scale)
        if self.aside is not None:
            gone, place = self.aside.runs, self.aside.path.relative_to(self._config.root)
            runs = "a store that cannot be read" if gone is None else f"{gone} run{'s' * (gone != 1)}"
            self._lines.say("dev.fresh", f"the store is empty: {runs} went to {place}", runs=gone, kept_in=str(place))

    async def _farewell(self) -> None:
        left = await self._left()
        self._lines.say(
            "dev.stopped", f"stopped; kept for next time: {spelled(left)}" if left else "stopped", left=left
        )

    async def _left(self) -> dict[str, int]:
        """Live runs by what people call their state."""
        counted: Counter[str] = Counter()
        for opened in self._server.stores():
            for (status, reason), count in (await opened.do(CountRuns())).items():
                counted["running" if status == Status.RUNNING else reason] += count
        return dict(counted)


def _fixed(config: "Config") -> dict[str, object]:
    """What a running `tako dev` cannot change."""
    return {
        "name": config.name, "dir": config.workflows.dir, "[app]": config.app, "[storage]": config.storage,
        "[metrics]": config.metrics,
    }  # fmt: skip
