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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tako_cli import context, output, wording
from tako_cli.dev.lines import Event, Lines
from tako_cli.dev.once import Workable, work_off
from tako_cli.dev.watch import Watch
from tako_runtime import log, store
from tako_runtime.child import TERMINAL
from tako_runtime.errors import TakoError
from tako_runtime.reclaim import reclaim
from tako_runtime.run import Status
from tako_runtime.secrets import guarded, reserve, stored
from tako_runtime.server import Server, alone
from tako_runtime.store.base import CountRuns
from tako_runtime.store.commit import StoreThread

if TYPE_CHECKING:
    from rich.text import Text

    from tako_runtime.config import Config
    from tako_runtime.manifest import Declared, Manifest
    from tako_runtime.store.file import Aside

#: How many workflows the first lines name.
_LISTED = 4


@dataclass(frozen=True, slots=True)
class Options:
    """How this `tako dev` was asked for. `read()` is the project's config, as it is by then; `shell` are the variables
    that win over it."""

    read: "Callable[[], Config]"
    shell: Mapping[str, str]
    once: bool = False
    fresh: bool = False
    process: bool = False
    as_json: bool = False


def develop(config: "Config", manifest: "Manifest", options: Options) -> int:
    """Run the project here until told to stop; the exit code."""
    reserve()
    home = store.project_home(config.name, config.root, config.storage.url)
    with alone(home.app_dir, "tako dev"):
        secrets = stored(home.app_dir)
        aside = store.set_aside(home) if options.fresh else None
        opened = store.open_store(home)
        try:
            with guarded(secrets):
                session = Session(config, manifest, home, opened, options, secrets)
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
        )  # fmt: skip
        environment = self._environment()
        self._server = Server(
            opened, home, config, self._heard, log_level="debug", environment=environment,
            secrets=secrets, together=not (options.process or options.once),
        )  # fmt: skip
        self._watch: Watch | None = None
        self._broken: set[str] = set()
        self.aside: Aside | None = None  # the store that was put aside
        self._news = asyncio.Event()
        self._stops = 0
        self._dead = False
        self._failed_starts: dict[str, int] = {}

    async def run(self) -> int:
        """Until Ctrl-C, or with `once` until nothing is left; the exit code."""
        loop, once = asyncio.get_running_loop(), self._options.once
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupted)
        if self._server.app is not None:
            self._server.app.bind()  # or say who has its port, before anything starts
        given_back: list[Event] = []
        with log.sink(given_back.append):
            await reclaim(self._store, self._home.app_dir, wording.now())
        await self._server.take(self._manifest)
        await self._welcome()
        for event in given_back:
            self._announced(event)
        with log.sink(self._announced):
            self._server.look_at_secrets()
            beside = loop.create_task(self._work_off() if once else self._reload_what_is_saved())
            try:
                await self._server.run(firing=not once)  # to work off is not to start more
            finally:
                beside.cancel()  # where it has ended, this does nothing
                [left] = await asyncio.gather(beside, return_exceptions=True)
            if isinstance(left, Exception):
                raise left
        await self._farewell()
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
            self._server.supervisor.cleared(int(event["pid"]))
            return
        if event["event"] == "debugger.closed":
            self._lines.go_on()
        if event["event"] == "file.broken":
            self._broken.add(str(event.get("file")))
            self._know()
        self._lines.show(source, event)
        self._news.set()

    def _announced(self, event: Event) -> None:
        """From the supervisor, in this process."""
        if event["event"] == "group.paused":
            self._failed_starts[event["group"]] = event["failures"]
        self._dead = self._dead or (event["event"] == "run.reclaimed" and event["then"] == Status.DEAD)
        if event["event"] in ("code.loaded", "code.reloaded"):
            self._lines.mended()
            self._know()
        self._lines.of_supervisor(event)
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
            self._watch.know(self._server.supervisor.files, self._broken)

    def _interrupted(self) -> None:
        self._stops += 1
        if self._stops == 1:
            self._lines.say("dev.stopping", "stopping: runs go on to their next step boundary. Again: stop at once")
            self._stop()
            return
        self._server.kill()

    def _stop(self) -> None:
        self._server.stop()

    async def _work_off(self) -> bool:
        declared = {(flow.name, flow.group) for flow in self._manifest.workflows}
        try:
            return await work_off(self._store, Workable(declared, self._failed_starts), self._news, self._lines.say)
        finally:
            self._stop()

    # --- the first and the last lines ---

    async def _welcome(self) -> None:
        left = await self._left()
        flows = self._manifest.workflows
        path = (self._home.app_dir / "runs.db").relative_to(self._config.root)
        url = self._server.app.url if self._server.app is not None else None
        lines = [output.styled("tako dev  ", "dim").append(self._config.name, "bold")]
        if url is not None:
            lines[0].append(f"  {url}", "cyan")
        name_width = max((len(flow.name) for flow in flows[:_LISTED]), default=0)
        lines += [_workflow(flow, name_width) for flow in flows[:_LISTED]]
        if len(flows) > _LISTED:
            lines.append(output.styled(f"  and {len(flows) - _LISTED} more: tako workflows ls", "dim"))
        if not flows:
            lines.append(output.styled(f"  no workflow is declared in {self._config.workflows.dir}/ yet", "yellow"))
        lines.append(_fact("store", str(path)))
        if left:
            lines.append(_fact("left", f"{_spelled(left)}, from last time"))
        if how := _how_to_start(flows):
            lines.append(_fact("start", how))
        self._lines.banner([*lines, output.styled("")])
        for one in self._manifest.mistakes:
            message = f"{context.place(one.file, one.line)}: {one.message}"
            self._lines.say("file.broken", message, "error", file=one.file, line=one.line, error=one.message)
        self._lines.say(
            "dev.ready", f"{self._config.name} is ready", app=self._config.name, store=str(self._config.root / path),
            pid=os.getpid(), workflows=[flow.name for flow in flows], left=left, url=url,
        )  # fmt: skip
        if self.aside is not None:
            gone, place = self.aside.runs, self.aside.path.relative_to(self._config.root)
            runs = "a store that cannot be read" if gone is None else f"{gone} run{'s' * (gone != 1)}"
            self._lines.say("dev.fresh", f"the store is empty: {runs} went to {place}", runs=gone, kept_in=str(place))

    async def _farewell(self) -> None:
        left = await self._left()
        self._lines.say(
            "dev.stopped", f"stopped; kept for next time: {_spelled(left)}" if left else "stopped", left=left
        )

    async def _left(self) -> dict[str, int]:
        """Live runs by what people call their state."""
        counted: Counter[str] = Counter()
        for (status, reason), count in (await self._store.do(CountRuns())).items():
            counted["running" if status == Status.RUNNING else reason] += count
        return dict(counted)


def _workflow(flow: "Declared", width: int) -> "Text":
    line = output.styled("  ").append(flow.name, "bold")
    if flow.schedule or flow.group != "default":
        line.append(" " * (width - len(flow.name)))
    if flow.schedule:
        line.append(f"  {flow.schedule} {flow.timezone or 'UTC'}", "cyan")
    if flow.group != "default":
        line.append(f"  group {flow.group}", "dim")
    return line


def _fact(name: str, words: str) -> "Text":
    return output.styled(f"  {name:<7}", "dim").append(words, "default not dim")


def _spelled(left: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(left.items()))


def _how_to_start(flows: "tuple[Declared, ...]") -> str:
    """The command that starts a run of the workflow that nothing else would start."""
    flow: Any = next((flow for flow in flows if not flow.schedule), flows[0] if flows else None)
    if flow is None:
        return ""
    payload = "" if flow.payload in (None, "NoneType") else " --payload JSON"
    return f"tako runs start {flow.name}{payload}"
