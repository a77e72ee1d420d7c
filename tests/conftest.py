"""What every test may ask for: a home of its own, an open store, a clock, and the one place that polls."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import apsw
import pytest
from cli import make_project, start, tako
from hypothesis import settings
from postgres import NoPostgres, Server

from tako_runtime import clock, store
from tako_runtime.failure import Failure
from tako_runtime.run import Claimed, NewRun, Run, StepRecord, WorkerRecord, new_id
from tako_runtime.state import Change, Outcome, settle
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.workflow import Workflow, registry

if TYPE_CHECKING:
    from deploying import Shop
    from machines import Machine

T = TypeVar("T")

#: Batches that were carried out: by the "loop" or the "thread", and the kinds of their operations.
Carried = list[tuple[str, list[type[base.Operation[Any]]]]]

#: What a run failed with, where it does not matter what that was.
BROKE = Failure("ValueError", "no such card")

settings.register_profile("tako", deadline=None)  # a slow machine is no failure
settings.load_profile("tako")


class FakeClock:
    """A clock that stands still until it is told to move."""

    def __init__(self, start: int = 1_800_000_000 * clock.SECOND) -> None:
        self._now = start

    def now(self) -> int:
        return self._now

    def advance(self, micros: int) -> int:
        """Let `micros` microseconds pass; the instant it is then."""
        self._now += micros
        return self._now


class Caller:
    """Calls a store's operations at a clock that stands still, with the worker `w-1` on the list."""

    def __init__(self, store: StoreThread) -> None:
        self.do = store.do_sync
        self.clock = FakeClock()
        new_id.__self__._last = 0  # type: ignore[attr-defined]  # ids go by this clock, not by that of a test before
        self.join("w-1")

    @property
    def now(self) -> int:
        return self.clock.now()

    def join(self, worker: str, group: str = "default") -> None:
        record = WorkerRecord(worker, group, "host", 1, "dev", self.now, self.now + clock.HOUR)
        self.do(base.AddWorker(worker=record))

    def new(self, **fields: Any) -> NewRun:
        told = {
            "id": new_id(self.now), "workflow": "order", "group": "default", "payload": "null", "created_at": self.now,
            "due_at": self.now, "retries": 2, "backoff_base": clock.SECOND, "backoff_max": clock.HOUR,
        }  # fmt: skip
        return NewRun(**told | fields)

    def enqueue(self, **fields: Any) -> str:
        [run_id] = self.do(base.Enqueue(runs=[self.new(**fields)], now=self.now))
        return run_id

    def claim(
        self, limit: int = 1, worker: str = "w-1", group: str = "default", workflows: Sequence[str] = ("order",)
    ) -> list[Claimed]:
        op = base.ClaimRuns(worker=worker, group=group, workflows=workflows, limit=limit, now=self.now)
        return self.do(op)

    def started(self, **fields: Any) -> Run:
        """A new run, claimed."""
        self.enqueue(**fields)
        [claimed] = self.claim()
        return claimed.run

    def get(self, run: Run) -> Run:
        found = self.do(base.GetRun(seq=run.seq))
        assert found is not None
        return found

    def save(self, run: Run, name: str, position: int = 1, status: str = "done", **fields: Any) -> StepRecord | None:
        told = {"kind": "run", "started_at": self.now, "finished_at": self.now, "result": b"1"}
        step = StepRecord(name=name, position=position, status=status, attempt=run.attempt, **told | fields)
        return self.do(base.SaveStep(seq=run.seq, claim=run.claim, step=step))

    def wait(
        self, run: Run, name: str, signal: str | None = None, position: int = 1, timeout: int | None = None
    ) -> StepRecord | None:
        due = None if timeout is None else self.now + timeout
        step = StepRecord("wait", name, position, "waiting", run.attempt, self.now, due_at=due)
        return self.do(base.OpenWait(seq=run.seq, claim=run.claim, step=step, signal=signal or name, now=self.now))

    def expire(self, run: Run, name: str) -> StepRecord | None:
        return self.do(base.ExpireWait(seq=run.seq, claim=run.claim, name=name, now=self.now))

    def signal(self, name: str, payload: str = "1", keep: int = 7 * clock.DAY) -> int:
        return self.do(base.SendSignal(name=name, payload=payload, now=self.now, expires_at=self.now + keep))

    def apply(self, change: Change) -> bool:
        return self.do(base.Apply(change=change))

    def settle(self, run: Run, outcome: Outcome) -> bool:
        """Write what `outcome` makes of the run as it was seen."""
        return self.apply(settle(run, outcome, self.now))


def ids(runs: list[Run]) -> list[str]:
    """The ids of the runs, in their order."""
    return [run.id for run in runs]


def until(condition: Callable[[], T], seconds: float = 20) -> T:
    """What `condition` gives once that is true; a failure after `seconds`. In an event loop, `asyncio.to_thread` it.

    The one place that polls, for what sends no event.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {condition}")
        time.sleep(0.01)
    return found


def script(code: str, *args: object, home: Home | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A process of its own, the leader of its group, that runs `code` with pipes for its input and output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TAKO_")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=env | (home.environment() if home else {}),
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextmanager
def lock_held(path: Path) -> Iterator[None]:
    """Another writer's turn, as long as the block lasts."""
    file = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(file)


def healthy(path: Path) -> bool:
    """Whether SQLite finds no damage in the file."""
    with apsw.Connection(str(path)) as connection:
        found = connection.pragma("integrity_check")
    connection.close()
    return bool(found == "ok")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Modes of files hold for this process, within, though the tests be run by root."""
    ours = os.geteuid()
    if ours == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(ours)


def finished(process: subprocess.Popen[str], seconds: float = 60) -> str:
    """What the process printed, once it has ended well."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it forked, which has the same pipes
        out, err = process.communicate()
        pytest.fail(f"not ended within {seconds:g} s; it said: {out}{err}")
    assert process.returncode == 0, err
    return out


@pytest.fixture(autouse=True)
def _no_home_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test finds no store but its own."""
    for name in ("TAKO_APP_NAME", "TAKO_DATA_DIR", "TAKO_ENV", "TAKO_RELEASE", "TAKO_STORAGE", "TAKO_STORAGE_ENV"):
        monkeypatch.delenv(name, raising=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that says `STORES = BOTH` is about what every store does."""
    stores = getattr(metafunc.module, "STORES", None)
    said = any(mark.args[0] == "dialect" for mark in metafunc.definition.iter_markers("parametrize"))
    if stores and not said and "dialect" in metafunc.fixturenames:
        metafunc.parametrize("dialect", stores)


#: For a module's `STORES`; and for a test in it that is about the embedded store's file.
BOTH = ("sqlite", "postgres")
of_the_file = pytest.mark.parametrize("dialect", ["sqlite"])


@pytest.fixture
def dialect() -> str:
    """Which store a test is about that does not say so: TEST_STORE=postgres tries them all on the other one."""
    return os.environ.get("TEST_STORE", "sqlite")


@pytest.fixture(scope="session")
def _servers() -> Iterator[list[Server]]:
    """The session's database server, once somebody has asked for it."""
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def server(_servers: list[Server]) -> Server:
    return the_server(_servers)


def the_server(_servers: list[Server]) -> Server:
    """The session's database server. Skips the test, and says why, where none can be run."""
    if not _servers:
        try:
            _servers.append(Server())
        except NoPostgres as error:
            pytest.skip(f"NO POSTGRES: {error}")
    return _servers[0]


@pytest.fixture
def own() -> Iterator[Server]:
    """A server of the test's own, to be stopped."""
    try:
        one = Server()
    except NoPostgres as error:
        pytest.skip(f"NO POSTGRES: {error}")
    yield one
    one.close()


@pytest.fixture
def home(request: pytest.FixtureRequest, dialect: str) -> Iterator[Home]:
    """A home with nothing in it yet, on a path that is short enough for sockets, for a store of that dialect."""
    with tempfile.TemporaryDirectory(prefix="tako-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        if dialect == "sqlite":
            yield Home("shop", Path(folder))
            return
        server: Server = request.getfixturevalue("server")
        url = server.database()
        yield Home("shop", Path(folder), url)
        server.drop(url)


@pytest.fixture
def path(home: Home) -> Path:
    """The embedded store's file."""
    return home.app_dir / "runs.db"


@pytest.fixture
def opened(home: Home) -> Iterator[StoreThread]:
    """An open store, which is this process's own while the test runs."""
    thread = open_store(home)
    store.use(thread)
    yield thread
    store.use(None)
    thread.close()


@pytest.fixture
def caller(opened: StoreThread) -> Caller:
    return Caller(opened)


@pytest.fixture
def clean_registry() -> Iterator[dict[str, Workflow[..., object]]]:
    """No workflow is declared; afterwards, those that were before."""
    before = dict(registry)
    registry.clear()
    yield registry
    registry.clear()
    registry.update(before)


@pytest.fixture
def web() -> "Iterator[Machine]":
    """A server of our own, with nothing on it; skips where this machine cannot run one."""
    from machines import machines

    with machines("web") as [one]:
        yield one


@pytest.fixture
def shop(web: "Machine", tmp_path: Path) -> "Shop":
    """A project whose server that is."""
    from deploying import Shop

    return Shop(tmp_path / "shop", {"web": web})


@pytest.fixture
def log(home: Home) -> Path:
    return home.data_dir / "bodies"


@pytest.fixture
def gate(home: Home) -> Path:
    path = home.data_dir / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture
def only_orders() -> Iterator[None]:
    """The workflows of `scenarios/flows/orders.py` are declared, and no others."""
    before = dict(registry)
    registry.clear()
    registry.update(
        {name: flow for name, flow in before.items() if flow.handler.__module__ == "scenarios.flows.orders"}
    )
    yield
    registry.clear()
    registry.update(before)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A project with a run in each state, by workflow, as `tako dev --once` left them. To be read, not changed."""
    project = make_project(tmp_path_factory.mktemp("worked") / "shop")
    runs = {
        "greet": start(project, "greet", "Ada", "--key", "ada"),
        "fail": start(project, "fail", {"card": 1}),
        "ask": start(project, "ask", {}),
        "nap": start(project, "nap", {}),
    }
    assert tako("dev", "--once", cwd=project).returncode == 1
    runs["yearly"] = start(project, "yearly", None, "--in", "5m")
    return project, runs


@pytest.fixture
def carried(opened: StoreThread, monkeypatch: pytest.MonkeyPatch) -> Carried:
    """Each batch: who has carried it out ("loop" or "thread"), and its operations. However busy the disk is, it counts
    as fast."""
    monkeypatch.setattr("tako_runtime.store.commit.AT_ONCE", 1 << 60)
    opened._slow = False
    batches: Carried = []
    execute = SqliteStore.execute

    def noting(self: SqliteStore, batch: Sequence[base.Operation[Any]]) -> Any:
        who = "loop" if threading.current_thread() is threading.main_thread() else "thread"
        batches.append((who, [type(op) for op in batch]))
        return execute(self, batch)

    monkeypatch.setattr(SqliteStore, "execute", noting)
    return batches


def whose(batches: Carried, kind: type[base.Operation[Any]]) -> list[str]:
    """Who has carried out the operations of that kind."""
    return [who for who, kinds in batches for each in kinds if each is kind]
