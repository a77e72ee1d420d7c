"""Give back the runs of workers that are gone: the outcome "worker lost"."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tako_runtime import clock, inflight
from tako_runtime.clock import REAL_TIME, Pace
from tako_runtime.log import emit
from tako_runtime.run import Status, WorkerRecord
from tako_runtime.state import Interrupted, WorkerLost, settle
from tako_runtime.store.base import Apply, GiveUpWorker, ListWorkers, RemoveWorker, RunsOf
from tako_runtime.store.commit import StoreThread


async def reclaim(
    store: StoreThread, app_dir: Path, now: int, *, but: Collection[str] = (), pace: Pace = REAL_TIME
) -> int:
    """Give back the runs of every worker whose lease has lapsed, or whose process on this machine is gone; the number
    of runs. `but` are workers that are not looked at. Safe to call from anywhere at any time: the claim number decides.
    """
    count = 0
    for worker in await store.do(ListWorkers()):
        lost = worker.lease_until <= now or inflight.gone(app_dir, worker.id) is True
        # A lease that was renewed since we looked is that of a worker that has woken up: it is not given up.
        if lost and worker.id not in but and await store.do(GiveUpWorker(worker=worker.id, seen=worker.lease_until)):
            count += await give_back(store, app_dir, worker, now, pace=pace)
    return count


async def cut_off(store: StoreThread, app_dir: Path, workers: Collection[str], now: int) -> None:
    """Give back what these had in hand when they were told to stop and did not in time: a drain uses up no attempt."""
    for worker in await store.do(ListWorkers()):
        if worker.id in workers and await store.do(GiveUpWorker(worker=worker.id, seen=worker.lease_until)):
            await give_back(store, app_dir, worker, now, drained=True)


async def give_back(
    store: StoreThread,
    app_dir: Path,
    worker: WorkerRecord,
    now: int,
    *,
    drained: bool = False,
    pace: Pace = REAL_TIME,
) -> int:
    """Give back the runs of one worker that was given up, and take it off the list."""
    places = inflight.places(app_dir, worker.id)
    count = 0
    while not await store.do(RemoveWorker(worker=worker.id)):
        for run in await store.do(RunsOf(worker=worker.id)):
            at = places(run.seq).where
            change = settle(run, Interrupted() if drained else WorkerLost(at), now, pace)
            if not await store.do(Apply(change=change)):
                continue
            count += 1
            step = {"step": at.removeprefix("in step ")} if at.startswith("in step ") else {}
            known: dict[str, Any] = {
                "run": run.id, "workflow": run.workflow, "attempt": run.attempt, "group": run.group,
                "ms": (now - (run.attempt_started_at or now)) / 1_000, **step,
            }  # fmt: skip
            if drained:
                emit("run.cut_off", where=at, **known)
                continue
            message = f"worker died during attempt {run.attempt} {at}".rstrip()
            again = "taken up at once" if change.due_at == now else f"again at {clock.iso(change.due_at or now)}"
            then = again if change.status == Status.PENDING else str(change.status)
            if change.status == Status.PENDING:
                known |= pace.told((change.due_at or now) - now)
            emit("run.reclaimed", message=message, then=then, **known)
    inflight.forget(app_dir, worker.id)
    return count
