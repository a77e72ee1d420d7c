"""4. decide(seen, wanted, now) -> what to start, and the loop that carries it out.

The supervisor starts worker processes when work is due, lets them leave when idle, keeps as many as a group wants,
replaces those that make no progress, and gives a dead worker's runs back at once. It never imports user code. Between
events it sleeps: the bell, a child's end, the next due time and a look once a second wake it.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tako_runtime import clock, rotation
from tako_runtime.child import TOGETHER, Child, Event, Group, Up
from tako_runtime.clock import REAL_TIME, Clock, Pace
from tako_runtime.crew import Crew
from tako_runtime.errors import StoreBusy, StoreLocked, StoreUnreachable, TakoError
from tako_runtime.health import Health
from tako_runtime.log import emit
from tako_runtime.manifest import Manifest, fingerprint
from tako_runtime.process import how
from tako_runtime.reclaim import Lost
from tako_runtime.run import new_id
from tako_runtime.store import Home
from tako_runtime.store.base import DataVersion, Demand, DropLease, RunsOf, TakeLease, Undeclared
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import release

#: The net under the bell, in seconds. At each look the supervisor also sees how its workers stand.
LOOK = 1.0

#: How soon it looks again, in seconds, where a run is due that another transaction has in hand.
SOON = 0.005

#: How often lapsed leases are looked for.
RECLAIM_EVERY = 5 * clock.SECOND

#: How long a group that only one of several machines may wake is that machine's, after its last word.
AWAKE = 10 * clock.SECOND

#: How long a step may take that is not to be cut off.
_ANY_TIME = 366 * clock.DAY

#: A worker that is not up after so many looks hangs; so does one that at so many looks in a row had free slots, and due
#: runs to take, and took none. Looks are counted, not seconds: a supervisor that was itself stopped accuses nobody.
START_LIMIT = 60
STALL_LIMIT = 30


@dataclass(frozen=True, slots=True)
class Seen:
    """What the supervisor sees: groups with due runs that a worker could take, live workers and pauses by group, groups
    that cannot work, and groups with a worker that has yet to prove itself."""

    due: frozenset[str] = frozenset()
    live: Mapping[str, int] = field(default_factory=dict)
    paused_until: Mapping[str, int] = field(default_factory=dict)
    unhealthy: frozenset[str] = frozenset()
    trying: frozenset[str] = frozenset()


def decide(seen: Seen, wanted: Mapping[str, Group], now: int) -> list[str]:
    """The groups to start a worker for, each as often as workers are missing. Pure.

    A group with `workers = N` has N; one with `workers = 0` gets one when a run is due, and none at rest. An unhealthy
    one is tried, due or not, by one worker at a time.

    >>> decide(Seen(due=frozenset({"default"})), {"default": Group()}, 0)
    ['default']
    >>> decide(Seen(live={"email": 1}), {"email": Group("email", workers=3)}, 0)
    ['email', 'email']
    """
    starts: list[str] = []
    for name in sorted(set(wanted) | seen.due | seen.unhealthy):
        group = wanted.get(name) or Group(name)
        missing = (group.workers or int(name in seen.due | seen.unhealthy)) - seen.live.get(name, 0)
        if name in seen.unhealthy:
            missing = min(missing, int(name not in seen.trying))
        if seen.paused_until.get(name, 0) <= now:
            starts += [name] * missing
    return starts


class Supervisor:
    """The workers of one app on this machine, until stopped. `show(source, event)` gets each event of its workers and
    each line that they print; `other(name)` says what a group should be that is not in `wanted`; `reread()` is asked
    for when a file has changed while something cannot work.

    With `together` one process is up at all times and takes the runs of all groups, and the next one stands by, so that
    `reload()` has new code at work within a blink; `declare(manifest)` is told what it has found in the files.

    `local`: its workers are for this machine's own store beside a shared one, and `store` is that."""

    def __init__(
        self,
        store: StoreThread,
        home: Home,
        root: Path,
        folder: str,
        wanted: Mapping[str, Group],
        show: Callable[[str, Event], None],
        *,
        other: Callable[[str], Group] = Group,
        together: bool = False,
        local: bool = False,
        declare: Callable[[Manifest], Awaitable[object]] | None = None,
        reread: Callable[[], Awaitable[object]] | None = None,
        lease: int = 15 * clock.SECOND,
        start_limit: int = START_LIMIT,
        stall_limit: int = STALL_LIMIT,
        log_level: str = "info",
        environment: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        pace: Pace = REAL_TIME,
    ) -> None:
        self.turns = 0  # how often the loop has gone round
        self._store, self._home, self._root, self._folder = store, home, root, folder
        self._wanted, self._other, self._reread = dict(wanted), other, reread
        self._show, self._lease = show, lease
        self._declare = declare
        self._all = self._of_all() if together else None
        self._start_limit, self._stall_limit = start_limit, stall_limit
        self._clock: Clock = clock or store.clock
        self._pace = pace  # of the pauses of runs whose worker died
        words = [
            "--dir", folder, "--lease", f"{lease}us", "--import-limit", f"{start_limit / 2}s", "--log-level", log_level,
            *(["--local"] if local else []),
        ]  # fmt: skip
        self._crew = Crew(
            root, words, self._with_own(environment or os.environ), secrets or {}, self.mark, self._said, self._ended,
            self._clock, together=together,
        )  # fmt: skip
        self._tasks: set[asyncio.Future[object]] = set()
        self._health = Health(store, self._clock)
        self._manifest: Manifest | None = None
        self._files = fingerprint(root, folder)
        self._due: frozenset[str] = frozenset()
        self._undeclared: dict[str, str] = {}
        self._told: set[tuple[str, str]] = set()
        self._reading = False
        self._awake: dict[str, int] = {}  # groups at rest that are this machine's to wake, and until when
        self._lost = Lost(store, home, self._crew.children, self._clock, lease, pace)
        self._wake = asyncio.Event()
        self._secrets_version = rotation.version(home.app_dir)
        self._own_mark: rotation.Mark | None = None
        self._dirty = True
        self.stopping = self._succeeded = False

    def declare(self, manifest: Manifest) -> None:
        """What the workflows declare. Until it is known, a worker is started for whatever is due."""
        self._manifest = manifest
        self._told.clear()
        self._health.try_now()
        self._look_anew()

    async def run(self) -> None:
        """Supervise until `stop()`; then drain the workers, and leave none behind."""
        listener = self._store.bell.listen("s-" + new_id(self._clock.now()))
        listener.start(self._heard)
        await self._health.forget()
        self._mark_anew()
        try:
            await self._supervise()
        finally:
            listener.close()
            self._unmark()
            if not self._succeeded:
                with contextlib.suppress(TakoError):
                    await self._let_go(list(self._awake))  # what drains here claims nothing: another machine may
            await self._crew.end_all()
            if not self._succeeded:
                await self._health.forget()

    def stop(self, *, succeeded: bool = False) -> None:
        """Drain and leave. Where another one has `succeeded` us, what is known of the groups is its to say. Call it in
        the event loop."""
        self.stopping = True
        self._succeeded = self._succeeded or succeeded
        self._wake.set()

    @property
    def secrets(self) -> Mapping[str, str]:
        """What workers get that start from now on."""
        return self._crew.secrets

    def renew(self, values: Mapping[str, str]) -> None:
        """Go on with these secrets. A worker that has others claims nothing more and ends at its runs' next step
        boundary, however long that takes: what it has in hand goes on in another one, and no attempt is used up."""
        if values != self.secrets:
            self._crew.secrets = values
            for child in list(self._crew.children):
                if not child.leaving:
                    self._crew.end(child, within=_ANY_TIME)
        self._secrets_version = rotation.version(self._home.app_dir)
        self._mark_anew()
        self._look_anew()

    def mark(self, what: str) -> rotation.Mark:
        """For a process that gets these secrets."""
        return rotation.mark(self._home.app_dir, self._secrets_version, what)

    def _mark_anew(self) -> None:
        """Which ones the supervisor itself has read."""
        self._unmark()
        self._own_mark = self.mark(rotation.SUPERVISOR)
        self._own_mark.of(os.getpid())

    def _unmark(self) -> None:
        if self._own_mark is not None:
            self._own_mark.drop()

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._crew.children]

    def kill(self) -> None:
        """End every worker at once, with what it has started. Their runs go on at the next start."""
        self._crew.kill()

    # --- the loop ---

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        data_version, next_at, reclaim_at, looked_at = -1, None, 0, loop.time()
        while not self.stopping:
            now, away = self._clock.now(), False
            try:
                version = await self._store.do(DataVersion())
                now = self._clock.now()  # a shared store that is opened only now says by how much this clock is off
                if now >= reclaim_at:
                    reclaim_at = now + RECLAIM_EVERY
                    await self._lost.look()
                    self._dirty = True
                if self._dirty or version != data_version or (next_at is not None and next_at <= now):
                    self._dirty, data_version = False, version
                    next_at = await self._look_at_demand(now)
                if loop.time() - looked_at >= LOOK * 0.9:
                    looked_at = loop.time()
                    await self._look_at_workers()
                    self._look_at_files()
                await self._health.report()
                await self._keep_awake()
            except StoreBusy as error:
                emit("store.busy", error=str(error))
                self._dirty, next_at = True, None  # what was to be looked at has not been
                away = isinstance(error, StoreUnreachable)
                if isinstance(error, StoreLocked):
                    await self._lost.end_frozen({error.holder})
            if not away:  # a worker that is started now could not begin, and its group would get the blame
                await self._act(now)
            self.turns += 1
            times = [at for at in self._health.paused_until.values() if at > now]
            if next_at is not None:
                times.append(next_at)
            ahead = min([LOOK, *((at - self._clock.now()) / clock.SECOND for at in times)])
            await self._sleep(ahead if ahead > 0 else SOON)

    async def _act(self, now: int) -> None:
        live: dict[str, int] = {}
        staying = [child for child in self._crew.children if not child.leaving]
        for child in staying:
            live[child.group.name] = live.get(child.group.name, 0) + 1
        trying = frozenset(child.group.name for child in staying if child.trial and not child.claimed)
        unhealthy = frozenset(self._health.reasons)
        named = {*self._wanted, *(self._manifest.groups if self._manifest else ()), *self._due, *unhealthy}
        if self._all is not None:
            sick = frozenset({self._all.name} if unhealthy else ())
            seen = Seen(frozenset(), live, self._health.paused_until, sick, trying)
            wanted = {self._all.name: self._all}
        else:
            seen = Seen(self._due, live, self._health.paused_until, unhealthy, trying)
            wanted = {name: self._group(name) for name in named}
        for name in decide(seen, wanted, now):
            group = wanted.get(name) or self._group(name)
            if group.workers or await self._may_wake(name):
                await self._start(group)

    async def _may_wake(self, name: str) -> bool:
        """Of several machines one wakes a group that is at rest: who has the lease for it, which is kept while the
        group's worker lives there. The others see that it is taken, and stay as they are."""
        now = self._clock.now()
        if not self._store.shared or self._awake.get(name, 0) > now + AWAKE // 2:
            return True
        lease = TakeLease(name=_to_wake(name), holder=self._home.server, until=now + AWAKE, now=now)
        try:
            taken = await self._store.do(lease)
        except StoreBusy as error:
            emit("store.busy", error=str(error))
            return False
        if taken:
            self._awake[name] = lease.until
        return taken

    async def _keep_awake(self) -> None:
        """Keep that lease for the groups that have a worker here, and let go of it for those that have none now."""
        here = {child.group.name for child in self._crew.children}
        for name in here & self._awake.keys():
            await self._may_wake(name)
        await self._let_go(self._awake.keys() - here)

    async def _let_go(self, names: Iterable[str]) -> None:
        for name in names:
            await self._store.do(DropLease(name=_to_wake(name), holder=self._home.server))
            del self._awake[name]

    async def _sleep(self, seconds: float) -> None:
        handle = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        handle.cancel()
        self._wake.clear()

    def _heard(self, topics: set[str]) -> None:
        if any(topic.startswith("due:") or topic == "later" for topic in topics):
            self._look_anew()

    def _look_anew(self) -> None:
        self._dirty = True
        self._wake.set()

    def _group(self, name: str) -> Group:
        return self._wanted.get(name) or self._other(name)

    # --- what there is to see ---

    async def _look_at_demand(self, now: int) -> int | None:
        """Which groups have due runs that a worker could take; when the next run is due."""
        demand = await self._store.do(Demand(now=now))
        self._undeclared = {}
        if demand.groups and (known := self._manifest) is not None:
            nobodys = await self._store.do(Undeclared(declared=known.groups))
            # Where a file is broken, the run may be of a workflow in it: then a worker of that group has to say so.
            self._undeclared = {g: name for g, name in nobodys.items() if not known.mistakes or g in known.groups}
        for group, workflow in self._undeclared.items() - self._told:
            self._told.add((group, workflow))
            emit("group.undeclared", group=group, workflow=workflow)
        self._due = demand.groups - self._undeclared.keys()
        return demand.next_at

    async def _look_at_workers(self) -> None:
        """Replace those that hang. One whose slots are all taken is busy, however long that takes."""
        for child in list(self._crew.children):
            if child.leaving:
                continue
            if child.debugging:
                continue
            if not child.workers:
                limit = self._start_limit
                child.looks += 1
            elif due := self._due & child.workers.keys():
                limit = self._stall_limit
                stands = [await self._stands(child.workers[group]) for group in due]
                child.looks, child.idle = child.looks + 1 if any(stands) else 0, 0
            else:
                child.looks, child.idle = 0, child.idle + 1
                if child.trial:  # it is up, and nothing is due by which it could prove itself
                    child.trial = False
                    for group in self._groups_of(child.group):
                        self._health.healthy(group)
                if child.idle == self._stall_limit:
                    self._health.calm(child.group.name)
                continue
            if child.looks == limit:
                child.tell_where()
            elif child.looks > limit:
                self._replace(child, limit)

    async def _stands(self, up: Up) -> bool:
        """Whether a worker with free slots has taken nothing since the last look."""
        before = up.in_hand
        up.in_hand = frozenset((run.seq, run.claim) for run in await self._store.do(RunsOf(worker=up.worker)))
        return up.in_hand == before and len(up.in_hand) < up.slots

    def _look_at_files(self) -> None:
        """Somebody may be mending what cannot work: no pause makes them wait."""
        if not (self._health.reasons or self._undeclared) or self._reading:
            return
        files = fingerprint(self._root, self._folder)
        if files != self._files:
            self._files = files
            self._health.try_now()
            self._task(self._read_anew())

    async def _read_anew(self) -> None:
        if self._reread is not None:
            self._reading = True
            try:
                await self._reread()
            except TakoError as error:
                emit("server.unread", error=str(error))
            finally:
                self._reading = False

    # --- workers ---

    async def on_trial(self, group: Group) -> Child:
        """A worker of that group that claims nothing, for the caller to follow and to end. Raises `OSError`."""
        return await self._crew.on_trial(group)

    async def _start(self, group: Group) -> None:
        groups = self._wanted.values() if group is self._all else [group]
        try:
            child = await self._crew.start(group, groups)
        except OSError as error:
            reason = f"its worker cannot be started: {error.strerror}: {error.filename or sys.executable}"
            for name in self._groups_of(group):
                self._health.unhealthy(name, reason, "")
            self._health.paused(group.name)
            return
        child.trial = bool(self._health.reasons.keys() & self._groups_of(group))

    def _groups_of(self, group: Group) -> set[str]:
        """The groups whose runs such a worker process takes."""
        if self._all is None:
            return {group.name}
        return {*self._wanted, *(self._manifest.groups if self._manifest else ())} or {Group().name}

    def _said(self, child: Child, event: Event) -> None:
        match event["event"]:
            case "worker.claimed":
                self._health.proved(str(event.get("group")))
            case "worker.declared":
                if child.dismissed:
                    return
                manifest = self._crew.declared(child, event)
                for group in manifest.groups:  # what it could not work for is mended
                    self._health.healthy(group)
                if self._declare is not None:
                    self._task(self._declare(manifest))
                return
        self._show(str(event.get("group") or child.group.name), event)

    async def _ended(self, child: Child, code: int) -> None:
        """Give back what it had in hand; and see what its end says of its group."""
        group = child.group.name
        if child.replaces:  # the older one goes on
            if not child.dismissed and not self.stopping:
                emit("code.kept", reason=child.why(code)[0])
                self._crew.stand_by()
            return
        if code != 0:
            emit("worker.died", pid=child.pid, how=how(code), group=group)
        failed = not child.claimed and not child.leaving and (code != 0 or not child.workers)
        if failed and not self.stopping:
            for name in self._groups_of(child.group):
                if not child.workers or name in self._due:  # an idle one that somebody ended proves nothing
                    self._health.unhealthy(name, *child.why(code))
            self._health.paused(group)
        await self._lost.ended(child)
        self._look_anew()

    def cleared(self, pid: int) -> None:
        """The terminal is there for the debugger in that worker process."""
        for child in self._crew.children:
            if child.pid == pid:
                child.tell(b"cleared")

    def configure(self, wanted: Mapping[str, Group], environment: Mapping[str, str]) -> None:
        """What the groups are and what their workers find in their environment, from the next start on."""
        self._wanted, self._crew.environment = dict(wanted), self._with_own(environment)
        if self._all is not None:
            self._all = self._of_all()

    def _of_all(self) -> Group:
        """The one process of all groups, where a group that nobody has configured is like any other such."""
        return replace(TOGETHER, concurrency=self._other("").concurrency)

    def _with_own(self, environment: Mapping[str, str]) -> dict[str, str]:
        return {**environment, **self._home.environment(), "PYTHONUNBUFFERED": "1"}

    def reload(self) -> None:
        """Go on with the project's files as they are now. What is in hand stops at its next step boundary."""
        if not self._crew.reload(self._all or TOGETHER, self._wanted.values()):
            self._health.try_now()
        self._look_anew()

    def _replace(self, child: Child, looks: int) -> None:
        """Another takes its place at once, or after a pause where it has never claimed. It gets its grace, should it
        only be slow: what it has in hand is not taken from it before."""
        group, seconds = child.group.name, round(looks * LOOK)
        groups = child.workers.keys() & self._due or self._groups_of(child.group)
        if child.workers:
            child.verdict = f"its worker claimed nothing for {seconds} s, though runs were due and it had free slots"
            for name in groups:
                up = child.workers[name]
                emit("worker.stalled", worker=up.worker, pid=child.pid, group=name, seconds=seconds)
        else:
            child.verdict = f"its worker was not up after {seconds} s"
            emit("worker.late", pid=child.pid, group=group, seconds=seconds)
        for name in groups:
            self._health.unhealthy(name, *child.why(0))
        if not child.claimed:
            self._health.paused(group)
        self._crew.end(child, within=None if child.workers else 0, drained=False)

    def _task(self, work: Awaitable[object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _to_wake(group: str) -> str:
    """The lease for it. Each release has its own: another one's worker may not know what is due."""
    return f"wake {group} {release()}"
