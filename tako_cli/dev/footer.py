"""What stands below the log of `tako dev`: the queue, what runs, what is parked, what comes next, what is wrong."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tako_cli import output, wording
from tako_runtime import clock
from tako_runtime.errors import StoreBusy
from tako_runtime.run import Reason, Status
from tako_runtime.store.base import CountRuns, DataVersion, NextDue
from tako_runtime.store.commit import StoreThread

if TYPE_CHECKING:
    from rich.text import Text

Event = dict[str, Any]

#: How often the store is asked at most, in seconds: one number, and the rest only where that has changed.
LOOK = 1.0

#: So many groups that cannot work are told of with their reasons.
_SICK = 3


class Counts(NamedTuple):
    """Live runs by where they stand, and when the next one that is parked wakes up."""

    queued: int = 0
    running: int = 0
    retrying: int = 0
    parked: int = 0
    next_at: int | None = None


class Footer:
    """Keeps itself up to date on what is in `stores()`; `show(lines)` gets it when it has changed. Whoever pauses and
    stops sets `paused` and `stopping`."""

    def __init__(self, stores: "Callable[[], Sequence[StoreThread]]", show: "Callable[[Sequence[Text]], None]") -> None:
        self.reloaded_at: int | None = None
        self.paused = False
        self.stopping = False
        self._stores, self._show = stores, show
        self._counts = Counts()
        self._sick: dict[str, str] = {}
        self._versions: list[int] = []
        self._heard = True

    def heard(self, event: Event) -> None:
        """What the log gets too."""
        self.look_again()
        if event["event"] == "code.reloaded":
            self.reloaded_at = wording.now()
        elif event["event"] == "group.unhealthy":
            self._sick[event["group"]] = str(event["reason"])
        elif event["event"] == "group.healthy":
            self._sick.pop(event["group"], None)

    def look_again(self) -> None:
        """Something has happened: at the next look the runs are counted again."""
        self._heard = True

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._look()
            self.draw()
            await asyncio.sleep(LOOK)

    def draw(self) -> None:
        sick = [_sick(group, reason) for group, reason in list(self._sick.items())[:_SICK]]
        self._show([*sick, self._line(wording.now(), output.width())])

    async def _look(self) -> None:
        now, due = wording.now(), self._counts.next_at
        try:
            versions = [await store.do(DataVersion()) for store in self._stores()]
            if not self._heard and versions == self._versions and (due is None or due > now):
                return
            self._heard, self._versions = False, versions
            live: Counter[tuple[str, str]] = Counter()
            wakes = []
            for store in self._stores():
                counts = await store.do(CountRuns())
                live.update(counts)
                wakes.append(await store.do(NextDue()))
        except StoreBusy:  # the next look tells
            self._heard = True
            return
        of: Counter[str] = Counter()
        for (status, reason), n in live.items():
            of[str(reason)] += n * (status == Status.PENDING)
        self._counts = Counts(
            of[Reason.QUEUED], sum(n for (status, _), n in live.items() if status == Status.RUNNING),
            of[Reason.RETRYING], of[Reason.SLEEPING] + of[Reason.WAITING],
            min((run.due_at for run in wakes if run is not None and run.due_at is not None), default=None),
        )  # fmt: skip

    def _line(self, now: int, width: int) -> "Text":
        """As much of it as there is room for, the most important first."""
        counts, reloaded = self._counts, self.reloaded_at
        state = "stopping" if self.stopping else "paused" if self.paused else ""
        parts = [
            (f"{counts.queued} queued", "" if counts.queued else "dim"),
            (f"{counts.running} running", "cyan" if counts.running else "dim"),
            *([(f"{counts.retrying} retrying", "yellow")] if counts.retrying else []),
            (f"{counts.parked} parked", "" if counts.parked else "dim"),
        ]
        ahead = "" if counts.next_at is None else f"wakes {_ahead(counts.next_at - now)}"
        clock_time = "" if reloaded is None else f"{clock.moment(reloaded).astimezone():%H:%M:%S}"
        rest = [(ahead, ""), (f"reloaded {clock_time}" if clock_time else "", "dim"), ("? for keys", "dim")]
        line = output.styled(" ")
        for words, style in [(state, "bold yellow reverse"), *parts, *rest]:
            gap = 2 if line.cell_len > 1 else 0
            if words and line.cell_len + gap + len(words) < width:
                line.append(" " * gap).append(words, style)
        return line


def _ahead(micros: int) -> str:
    """How far ahead, in one unit, so that the line stays as it is for long."""
    for unit, size in (("d", clock.DAY), ("h", clock.HOUR), ("m", clock.MINUTE)):
        if micros >= 2 * size:
            return f"in {micros // size}{unit}"
    return f"in {max(micros // clock.SECOND, 1)}s" if micros > 0 else "now"


def _sick(group: str, reason: str) -> "Text":
    return output.styled(" ").append(f"group {output.one_line(group)} cannot work: {output.one_line(reason)}", "red")
