"""One `tako dev`, from its first line to its last child's end.

lock -> store -> give back what a crash left -> supervise until Ctrl-C (or, with --once, until nothing is left)
"""

import asyncio
import os
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

from tako_cli import context, output, wording
from tako_cli.dev.lines import Event, Lines
from tako_cli.dev.once import Workable, work_off
from tako_runtime import log, store
from tako_runtime.reclaim import reclaim
from tako_runtime.run import Status
from tako_runtime.secrets import guarded, stored
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


def develop(config: "Config", manifest: "Manifest", *, once: bool, as_json: bool, fresh: bool = False) -> int:
    """Run the project here until told to stop, `fresh` with an empty store; the exit code."""
    home = store.project_home(config.name, config.root, config.storage.url)
    with alone(home.app_dir, "tako dev"):
        secrets = stored(home.app_dir)
        aside = store.set_aside(home) if fresh else None
        opened = store.open_store(home)
        try:
            with guarded(secrets):
                session = Session(config, manifest, home, opened, as_json=as_json, secrets=secrets)
                session.aside = aside
                return asyncio.run(session.run(once=once))
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
        *,
        as_json: bool,
        secrets: dict[str, str],
    ) -> None:
        self._config, self._manifest, self._home, self._store = config, manifest, home, opened
        self._lines = Lines(
            config.root, sorted({*config.group_names(), *(flow.group for flow in manifest.workflows)}),
            [flow.name for flow in manifest.workflows], as_json=as_json, lost=self._stop,
        )  # fmt: skip
        self._server = Server(
            opened, home, config, self._heard, log_level="debug", environment=context.environment(config, home),
            secrets=secrets,
        )  # fmt: skip
        self.aside: Aside | None = None  # the store that was put aside
        self._news = asyncio.Event()
        self._stops = 0
        self._dead = False
        self._failed_starts: dict[str, int] = {}

    async def run(self, *, once: bool) -> int:
        """Until Ctrl-C, or with `once` until nothing is left; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupted)
        given_back: list[Event] = []
        with log.sink(given_back.append):
            await reclaim(self._store, self._home.app_dir, wording.now())
        await self._server.take(self._manifest)
        await self._welcome()
        for event in given_back:
            self._announced(event)
        with log.sink(self._announced):
            self._server.look_at_secrets()
            watch = loop.create_task(self._work_off()) if once else None
            await self._server.run(firing=not once)  # to work off is not to start more
        done = True
        if watch is not None:
            watch.cancel()  # where it has ended, this does nothing
            [left] = await asyncio.gather(watch, return_exceptions=True)
            if isinstance(left, Exception):
                raise left
            done = left is True
        await self._farewell()
        if self._stops > 1 or (once and self._stops):
            return 130
        return 1 if once and (self._dead or not done) else 0

    # --- what happens ---

    def _heard(self, source: str, event: Event) -> None:
        """From a worker."""
        if event["event"] == "worker.started":
            self._failed_starts.pop(source, None)
        self._dead = self._dead or event["event"] == "run.dead"
        self._lines.show(source, event)
        self._news.set()

    def _announced(self, event: Event) -> None:
        """From the supervisor, in this process."""
        if event["event"] == "group.paused":
            self._failed_starts[event["group"]] = event["failures"]
        self._dead = self._dead or (event["event"] == "run.reclaimed" and event["then"] == Status.DEAD)
        self._lines.of_supervisor(event)
        self._news.set()

    def _interrupted(self) -> None:
        self._stops += 1
        if self._stops == 1:
            self._lines.say("dev.stopping", "stopping: runs go on to their next step boundary. Again: stop at once")
            self._stop()
            return
        self._server.supervisor.kill()

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
        lines = [output.styled("tako dev  ", "dim").append(self._config.name, "bold")]
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
            pid=os.getpid(), workflows=[flow.name for flow in flows], left=left,
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
