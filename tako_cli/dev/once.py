"""`tako dev --once`: work until no run is queued, running or retrying. What sleeps or waits stays parked."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from tako_cli import wording
from tako_runtime import clock
from tako_runtime.errors import StoreBusy
from tako_runtime.run import Reason, Run, Status
from tako_runtime.store.base import CountRuns, ListRuns
from tako_runtime.store.commit import StoreThread

#: Why a pending run is pending that is to be worked off.
ACTIVE = (Reason.QUEUED, Reason.RETRYING)

#: After so many workers in a row that ended before they began, nobody takes the runs of their group.
FAILED_STARTS = 3

_ALL = 1_000_000


class Workable(NamedTuple):
    """Who can take a run: which workflow is declared in which group, and how often each group's workers have just
    failed to start."""

    declared: Collection[tuple[str, str]]
    failed_starts: dict[str, int]

    def obstacle(self, run: Run) -> str:
        """Why nobody can take this run; "" where somebody can."""
        if (run.workflow, run.group) not in self.declared:
            return f"no file declares {run.workflow!r} in group {run.group}"
        if self.failed_starts.get(run.group, 0) >= FAILED_STARTS:
            return f"the workers of group {run.group} end before they begin"
        return ""


async def work_off(
    stores: Callable[[], Sequence[StoreThread]], workable: Workable, news: asyncio.Event, say: Callable[..., None]
) -> bool:
    """Returns once nothing is left: True; or once nobody can take what is left: False, and says so. Looks at every
    event (`news`), and once a second."""
    said = ""
    while True:
        news.clear()
        try:
            active = [state for store in stores() for state in _active(await store.do(CountRuns()))]
            if not active:
                return True
            if not any(status == Status.RUNNING for status, _ in active):
                left = [run for store in stores() for run in await _left(store)]
                obstacles = {run.id: workable.obstacle(run) for run in left}
                if left and all(obstacles.values()):
                    for why in sorted(set(obstacles.values())):
                        count = list(obstacles.values()).count(why)
                        say("dev.stranded", f"{count} run{'s' * (count > 1)} left that nobody can take: {why}", "error")
                    return False
                first = _due_later([run for run in left if not obstacles[run.id]])
                if first is not None and first.id != said:
                    said = first.id
                    say("dev.waiting", _waits_for(first), run=first.id, workflow=first.workflow)
        except StoreBusy:  # the next look will tell
            pass
        try:
            async with asyncio.timeout(1):
                await news.wait()
        except TimeoutError:
            pass


def _active(counts: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    return {state: n for state, n in counts.items() if state[0] == Status.RUNNING or state[1] in ACTIVE}


async def _left(store: StoreThread) -> list[Run]:
    pending = await store.do(ListRuns(statuses=[Status.PENDING], limit=_ALL))
    return [run for run in pending if run.reason in ACTIVE]


def _due_later(runs: list[Run]) -> Run | None:
    """The run that it waits for, where all that is left is due later."""
    first = min(runs, key=lambda run: run.due_at or 0, default=None)
    return first if first is not None and (first.due_at or 0) > wording.now() + clock.SECOND else None


def _waits_for(run: Run) -> str:
    due = clock.iso(run.due_at or 0)
    now = wording.now()
    return f"is {run.reason} and due at {wording.at(due, now)}: waiting for it ({wording.distance(due, now)})"
