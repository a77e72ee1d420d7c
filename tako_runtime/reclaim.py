"""Give back the runs of workers that are gone: the outcome "worker lost", which costs an attempt; or "interrupted",
which costs none, where a worker was told to stop and was ended because its grace had passed."""

from collections.abc import Collection
from pathlib import Path

from tako_runtime import clock, inflight
from tako_runtime.log import emit
from tako_runtime.run import Status, WorkerRecord
from tako_runtime.state import Interrupted, WorkerLost, settle
from tako_runtime.store.base import Apply, GiveUpWorker, ListWorkers, RemoveWorker, RunsOf
from tako_runtime.store.commit import StoreThread


async def reclaim(
    store: StoreThread, app_dir: Path, now: int, *, but: Collection[str] = (), overdue: Collection[str] = ()
) -> int:
    """Give back the runs of every worker whose lease has lapsed, or whose process on this machine is gone; the number
    of runs. `but` are workers that are not looked at, `overdue` those that were ended for their grace had passed. Safe
    to call from anywhere at any time: the claim number decides."""
    count = 0
    for worker in await store.do(ListWorkers()):
        lost = worker.lease_until <= now or inflight.gone(app_dir, worker.id) is True
        # A lease that was renewed since we looked is that of a worker that has woken up: it is not given up.
        if lost and worker.id not in but and await store.do(GiveUpWorker(worker=worker.id, seen=worker.lease_until)):
            count += await give_back(store, app_dir, worker, now, overdue=worker.id in overdue)
    return count


async def give_back(store: StoreThread, app_dir: Path, worker: WorkerRecord, now: int, *, overdue: bool = False) -> int:
    """Give back the runs of one worker that was given up, and take it off the list."""
    places = inflight.places(app_dir, worker.id)
    count = 0
    while not await store.do(RemoveWorker(worker=worker.id)):
        for run in await store.do(RunsOf(worker=worker.id)):
            at = places(run.seq).where
            change = settle(run, Interrupted() if overdue else WorkerLost(at), now)
            if not await store.do(Apply(change=change)):
                continue
            count += 1
            what = "cut off, for the grace had passed," if overdue else "worker died"
            message = f"{what} during attempt {run.attempt} {at}".rstrip()
            again = "taken up at once" if change.due_at == now else f"again at {clock.iso(change.due_at or now)}"
            then = again if change.status == Status.PENDING else str(change.status)
            step = {"step": at.removeprefix("in step ")} if at.startswith("in step ") else {}
            emit(
                "run.reclaimed", run=run.id, workflow=run.workflow, attempt=run.attempt, group=run.group,
                message=message, then=then, ms=(now - (run.attempt_started_at or now)) / 1_000, **step,
            )  # fmt: skip
    inflight.forget(app_dir, worker.id)
    return count
