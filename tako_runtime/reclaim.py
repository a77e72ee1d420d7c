"""Give back the runs of workers that are gone: the outcome "worker lost"."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tako_runtime import clock, inflight
from tako_runtime.child import Child
from tako_runtime.clock import REAL_TIME, Clock, Pace
from tako_runtime.errors import StoreBusy
from tako_runtime.inflight import gone
from tako_runtime.log import emit
from tako_runtime.run import Status, WorkerRecord
from tako_runtime.state import Interrupted, WorkerLost, settle
from tako_runtime.store import Home
from tako_runtime.store.base import Apply, GiveUpWorker, ListWorkers, RemoveWorker, RunsOf, TakeLease
from tako_runtime.store.commit import StoreThread

#: The least time, in seconds, that a worker of this machine has to renew a lease that has lapsed, once the store takes
#: writes again.
RENEWAL = 2.0


class Lost:
    """Workers that are gone, as the supervisor of `children` sees them."""

    def __init__(
        self, store: StoreThread, home: Home, children: Collection[Child], ticking: Clock, lease: int, pace: Pace
    ) -> None:
        self._store, self._home, self._children, self._clock = store, home, children, ticking
        self._lease, self._pace = lease, pace
        self._lapsed: dict[tuple[str, int], float] = {}  # workers of this machine, their leases, and since when

    async def look(self) -> None:
        """Give back what lost workers had in hand. One of this machine whose lease has lapsed may have been kept from
        renewing it: by a store that took no write, a machine that was suspended, a clock that was set. So it gets the
        time for that, once a write of ours has landed; if it stays lapsed, it does not run any more."""
        now, seconds = self._clock.now(), asyncio.get_running_loop().time
        lapsed = {
            (worker.id, worker.lease_until): worker.pid
            for worker in await self._store.do(ListWorkers())
            if worker.lease_until <= now and gone(self._home.app_dir, worker.id) is False
        }
        if lapsed.keys() - self._lapsed.keys():
            await self._store.do(
                TakeLease(name=f"reclaim {self._home.server}", holder=self._home.server, until=now, now=now)
            )
        at = seconds()
        self._lapsed = {key: self._lapsed.get(key, at) for key in lapsed}
        patience = max(self._lease / 2 / clock.SECOND, RENEWAL)
        frozen = {key for key, since in self._lapsed.items() if at - since >= patience}
        await self.end_frozen({lapsed[key] for key in frozen})
        spared = {worker for worker, _ in lapsed.keys() - frozen}
        await reclaim(self._store, self._home.app_dir, self._clock.now(), but=spared, pace=self._pace)

    async def end_frozen(self, pids: Collection[int | None]) -> None:
        """End those of ours that are among these processes and do not renew their leases (stopped, or hanging with the
        interpreter held), with whatever lock they hold. Their runs go on in others."""
        if not any(child.pid in pids for child in self._children):
            return
        now = self._clock.now()
        lapsed = {w.pid: w.id for w in await self._store.do(ListWorkers()) if w.lease_until <= now}
        for child in self._children:
            if child.pid in pids and child.pid in lapsed:
                child.verdict = "its worker did not renew its lease"
                emit("worker.frozen", worker=lapsed[child.pid], pid=child.pid, group=child.group.name)
                child.kill()

    async def ended(self, child: Child) -> None:
        """Give back what that one had in hand, be it at a drain."""
        try:
            if child.drained:
                ids = {up.worker for up in child.workers.values()}
                await cut_off(self._store, self._home.app_dir, ids, self._clock.now())
            await self.look()
        except StoreBusy as error:  # the next round does it
            emit("store.busy", error=str(error))


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
