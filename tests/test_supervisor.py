"""The supervisor: what it starts and when, what it gives back, and what it leaves behind, which is nothing."""

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from conftest import until
from scenarios.flows import orders
from scenarios.flows.orders import Case
from workers import bodies, gone, now, shown, status, supervised, worker_process, workers

from tako_runtime import clock
from tako_runtime.child import Child, Group
from tako_runtime.control import Control
from tako_runtime.store import Home
from tako_runtime.store.base import ListWorkers
from tako_runtime.store.commit import StoreThread
from tako_runtime.supervisor import Seen, decide

# They run processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture
def log(home: Home) -> Path:
    return home.data_dir / "bodies"


def ended(opened: StoreThread, run_id: str, seconds: float = 20) -> str:
    until(lambda: shown(opened, run_id)["finished_at"], seconds)
    return status(opened, run_id)[0]


# --- decide ----------------------------------------------------------------------------------------------------------

AT_REST, TWO, EMAIL = Group(), Group(workers=2), Group("email", workers=3)
DUE = frozenset({"default"})


@pytest.mark.parametrize(
    ("seen", "wanted", "starts"),
    [
        (Seen(), {}, []),
        (Seen(), {"default": AT_REST}, []),
        (Seen(due=DUE), {"default": AT_REST}, ["default"]),
        (Seen(due=DUE, live={"default": 1}), {"default": AT_REST}, []),
        (Seen(due=DUE), {}, ["default"]),
        (Seen(due=frozenset({"b", "a"})), {}, ["a", "b"]),
        (Seen(), {"default": TWO}, ["default", "default"]),
        (Seen(due=DUE), {"default": TWO}, ["default", "default"]),
        (Seen(live={"default": 1}), {"default": TWO}, ["default"]),
        (Seen(live={"default": 2}), {"default": TWO}, []),
        (Seen(live={"default": 5}), {"default": TWO}, []),
        (Seen(due=DUE, live={"email": 1}), {"default": AT_REST, "email": EMAIL}, ["default", "email", "email"]),
        (Seen(due=DUE, paused_until={"default": 101}), {"default": AT_REST}, []),
        (Seen(due=DUE, paused_until={"default": 100}), {"default": AT_REST}, ["default"]),
        (Seen(paused_until={"default": 101}), {"default": TWO, "email": EMAIL}, ["email"] * 3),
        (Seen(unhealthy=DUE), {"default": AT_REST}, ["default"]),
        (Seen(unhealthy=DUE), {}, ["default"]),
        (Seen(unhealthy=DUE, due=DUE), {"default": EMAIL}, ["default"]),
        (Seen(unhealthy=DUE, live={"default": 1}), {"default": EMAIL}, ["default"]),
        (Seen(unhealthy=DUE, live={"default": 1}, trying=DUE), {"default": EMAIL}, []),
        (Seen(unhealthy=DUE, live={"default": 1}), {"default": AT_REST}, []),
        (Seen(unhealthy=DUE, paused_until={"default": 101}), {"default": AT_REST}, []),
        (Seen(live={"default": 1}, trying=DUE), {"default": EMAIL}, ["default", "default"]),
    ],
)
def test_decide(seen: Seen, wanted: dict[str, Group], starts: list[str]) -> None:
    assert decide(seen, wanted, 100) == starts


# --- starting --------------------------------------------------------------------------------------------------------


def test_one_enqueue_starts_one_process_which_leaves_when_idle_and_is_started_again(
    opened: StoreThread, home: Home
) -> None:
    with supervised(home, idle_timeout=clock.SECOND // 5) as supervisor:
        assert supervisor.spawned == []
        for n in (1, 2):
            run_id = orders.answers.enqueue_sync("x")
            assert ended(opened, run_id) == "succeeded"
            assert len(supervisor.spawned) == n
            until(lambda n=n: len(supervisor.events("worker.stopped")) == n)
            until(lambda: gone(supervisor.spawned[-1]))
        assert supervisor.events("worker.died") == []


def test_a_hundred_enqueues_start_one_process(opened: StoreThread, home: Home) -> None:
    with supervised(home) as supervisor:
        ids = [orders.answers.enqueue_sync(f"{n}") for n in range(100)]
        until(lambda: Control(opened).counts() == {})
        assert len(supervisor.spawned) == 1
    assert {shown(opened, run_id)["status"] for run_id in ids} == {"succeeded"}


def test_a_run_that_becomes_due_later_starts_a_process_then(opened: StoreThread, home: Home) -> None:
    with supervised(home) as supervisor:
        run_id = orders.answers.enqueue_sync("x", delay="1s")
        assert supervisor.spawned == []
        assert ended(opened, run_id) == "succeeded"
        assert len(supervisor.spawned) == 1
    run = shown(opened, run_id)
    assert run["started_at"] >= run["run_at"]


def test_each_group_with_due_work_gets_a_process_of_its_own(opened: StoreThread, home: Home) -> None:
    with supervised(home) as supervisor:
        mailed, other = orders.in_email.enqueue_sync(), orders.answers.enqueue_sync("x")
        assert (ended(opened, mailed), ended(opened, other)) == ("succeeded", "succeeded")
        assert sorted(event["group"] for event in supervisor.events("worker.spawned")) == ["default", "email"]


def test_a_group_that_wants_workers_has_them_and_a_killed_one_is_replaced(opened: StoreThread, home: Home) -> None:
    with supervised(home, workers=2) as supervisor:
        first = until(lambda: found if len(found := list(workers(opened).values())) == 2 else None)
        os.kill(first[0], signal.SIGKILL)
        until(lambda: len(workers(opened)) == 2 and first[0] not in workers(opened).values())
        assert first[1] in workers(opened).values()
        until(lambda: len(supervisor.spawned) == 3)
        [died] = supervisor.events("worker.died")
        assert (died["pid"], died["how"]) == (first[0], "killed by SIGKILL")


def test_at_rest_a_supervisor_and_its_worker_wake_about_as_often_as_they_look_once_a_second(
    opened: StoreThread, home: Home
) -> None:
    """Counted by the kernel, over all their threads, so that a slow machine does not matter: what polls shows."""
    with supervised(home, workers=1) as supervisor:
        assert ended(opened, orders.answers.enqueue_sync("x")) == "succeeded"
        pids = [supervisor.process.pid, *supervisor.spawned]
        before, began = [waits(pid) for pid in pids], clock.monotonic()
        until(lambda: clock.monotonic() - began > 3 * clock.SECOND)
        woken = [after - earlier for after, earlier in zip(map(waits, pids), before, strict=True)]
    assert max(woken) < 3 * 20, f"in 3 s, the supervisor and the worker: {woken}"


def waits(pid: int) -> int:
    """How often the threads of a process have waited for something so far."""
    told = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in told)


# --- deaths ----------------------------------------------------------------------------------------------------------


def test_a_run_whose_worker_is_killed_goes_on_at_once(opened: StoreThread, home: Home, log: Path) -> None:
    marker = str(home.data_dir / "died")
    with supervised(home, lease=clock.HOUR):
        run_id = orders.two_steps.enqueue_sync(Case(str(log), marker=marker, die="after b"))
        assert ended(opened, run_id) == "succeeded"
    assert bodies(log) == ["a", "b", "b"]
    assert [a["outcome"] for a in shown(opened, run_id)["attempts"]] == ["lost", "succeeded"]


def test_a_worker_that_is_killed_is_seen_though_what_its_step_started_lives_on(
    opened: StoreThread, home: Home, log: Path
) -> None:
    """The program that the step started holds the worker's output open."""
    with supervised(home, lease=clock.HOUR):
        run_id = orders.spawns.enqueue_sync(Case(str(log), marker=str(home.data_dir / "died")))
        program = until(lambda: [int(line.partition(":")[2]) for line in bodies(log)])[0]
        try:
            assert ended(opened, run_id) == "succeeded"
            assert not gone(program)
        finally:
            os.kill(program, signal.SIGKILL)


def test_a_run_that_kills_its_workers_ends_dead_and_does_not_starve_its_neighbours(
    opened: StoreThread, home: Home, log: Path
) -> None:
    with supervised(home, lease=clock.HOUR):
        killer = orders.kills_its_worker.enqueue_sync(Case(str(log)), priority=1)
        neighbours = orders.two_steps.enqueue_many_sync([Case(str(log))] * 30)
        for run_id in neighbours:
            assert ended(opened, run_id) == "succeeded"
        assert ended(opened, killer) == "dead"
    run = shown(opened, killer)
    assert run["reason"] == "worker died during attempt 3 in step boom"
    assert bodies(log).count("boom") == 3


def test_a_worker_that_is_frozen_past_its_lease_is_replaced(opened: StoreThread, home: Home, log: Path) -> None:
    gate = home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, lease=clock.SECOND) as supervisor:
        run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
        until(lambda: bodies(log) == ["a"])
        os.kill(supervisor.spawned[0], signal.SIGSTOP)
        assert ended(opened, run_id, 30) == "succeeded"
        assert gone(supervisor.spawned[0])
    assert bodies(log) == ["a", "a", "b"]


def test_workers_that_cannot_renew_since_the_disk_is_full_are_not_ended_for_that(
    opened: StoreThread, home: Home, log: Path
) -> None:
    gate = home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, lease=clock.SECOND) as supervisor:
        run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
        until(lambda: bodies(log) == ["a"])
        size = (home.app_dir / "runs.db-wal").stat().st_size
        pids = [supervisor.process.pid, *supervisor.spawned]
        limits = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
        for pid, (_, hard) in zip(pids, limits, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
        until(lambda: supervisor.events("store.busy") or supervisor.events("worker.frozen"))
        for pid, given in zip(pids, limits, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, given)
        until(lambda: opened.do_sync(ListWorkers())[0].lease_until > now())
        with gate.open("wb"):
            pass
        assert ended(opened, run_id) == "succeeded"
        assert supervisor.events("worker.frozen") == []
    assert bodies(log) == ["a", "b"]


def test_at_its_start_it_gives_back_what_gone_workers_had_in_hand(opened: StoreThread, home: Home, log: Path) -> None:
    """Workers whose supervisor was not there to see their end."""
    run_id = orders.two_steps.enqueue_sync(Case(str(log), marker=str(home.data_dir / "died"), die="after a"))
    with worker_process(home, "--lease", "1h") as worker:
        assert worker.ended() == -signal.SIGKILL
    assert status(opened, run_id) == ("running", "claimed")
    with supervised(home):
        assert ended(opened, run_id) == "succeeded"


# --- a broken project ------------------------------------------------------------------------------------------------


def test_a_module_that_cannot_be_imported_is_reported_with_growing_pauses(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "broken.py").write_text("import a_module_that_is_not_there\n")
    run_id = orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=tmp_path) as supervisor:
        until(lambda: len(supervisor.events("group.paused")) == 2)
        paused = supervisor.events("group.paused")
        assert [event["failures"] for event in paused] == [1, 2]
        assert [event["pause"] for event in paused] == ["1s", "2s"]
        assert len(supervisor.spawned) == 2, "no flapping"
        broken = supervisor.events("file.broken")[0]
        assert (broken["file"], broken["line"]) == (str(folder / "broken.py"), 1)
        assert "a_module_that_is_not_there" in broken["error"]
        (folder / "broken.py").write_text(
            'from tako_runtime import workflow\n\n@workflow("answers")\nasync def answers(step):\n    return 1\n'
        )
        assert ended(opened, run_id) == "succeeded", "once it is mended, the run that was kept is done"


def test_what_cannot_be_read_of_a_worker_reaches_the_reader(opened: StoreThread, home: Home, tmp_path: Path) -> None:
    """A crash of the interpreter itself: its last words are no JSON."""
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "fatal.py").write_text("import os\nos.write(2, b'last words \\xff\\n')\nos.abort()\n")
    orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=tmp_path) as supervisor:
        [unhealthy] = until(lambda: supervisor.events("group.unhealthy"))
        assert "last words" in unhealthy["last_lines"]
        assert supervisor.events("worker.died")[0]["how"] == "killed by SIGABRT"


def test_a_line_of_any_length_does_not_stop_the_supervisor(opened: StoreThread, home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "loud.py").write_text(
        "from tako_runtime import workflow\n\n"
        '@workflow("answers")\nasync def answers(payload, step):\n    print("x" * 2_000_000)\n    return payload\n'
    )
    with supervised(home, folder="workflows", root=tmp_path) as supervisor:
        for _ in range(2):
            run_id = orders.answers.enqueue_sync("x")
            assert ended(opened, run_id) == "succeeded"
        assert len(supervisor.spawned) == 1


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_program_that_floods_the_pipe_of_a_worker_that_has_ended_does_not_hold_the_supervisor_up(
    tmp_path: Path,
) -> None:
    reading, writing = os.pipe()
    flood = """if True:
        import os
        ours, its = os.pipe()
        if os.fork():
            os.read(ours, 1)
            os._exit(7)
        os.setsid()  # what stays in the group of a worker ends with it
        print(os.getpid(), flush=True)
        os.write(its, b"1")
        while True:
            os.write(1, b"y" * 4096)
    """

    async def followed() -> list[str]:
        said: list[str] = []
        child = Child(
            Group(), [sys.executable, "-c", flood], tmp_path, dict(os.environ), clock.SystemClock(), [reading]
        )
        assert await child.follow(lambda event: said.append(event["message"])) == 7
        return said

    try:
        said = asyncio.run(followed())  # without end, where it is read for as long as there is something to read
        until(lambda: gone(int(said[0])))  # its pipe is closed, and it with it
    finally:
        os.close(reading)
        os.close(writing)


def test_stopping_drains_the_workers_and_leaves_no_process_behind(opened: StoreThread, home: Home, log: Path) -> None:
    gate = home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, workers=2) as supervisor:
        until(lambda: len(workers(opened)) == 2)
        run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
        until(lambda: bodies(log) == ["a"])
        supervisor.process.terminate()
        until(lambda: supervisor.events("worker.draining"))
        with gate.open("wb"):
            pass
        assert supervisor.process.wait(30) == 0
        assert all(gone(pid) for pid in supervisor.spawned)
    assert workers(opened) == {}
    assert status(opened, run_id) == ("pending", "queued")
    assert bodies(log) == ["a"]


def test_after_the_grace_what_does_not_stop_is_killed_and_its_run_given_back(
    opened: StoreThread, home: Home, log: Path
) -> None:
    gate = home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, grace=clock.SECOND // 2) as supervisor:
        run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
        until(lambda: bodies(log) == ["a"])
        assert supervisor.stop() == 0
        assert all(gone(pid) for pid in supervisor.spawned)
        [cut] = supervisor.events("run.cut_off")
        assert (cut["run"], cut["where"]) == (run_id, "in step a")
    assert status(opened, run_id) == ("pending", "queued")
    assert workers(opened) == {}
    with supervised(home):
        assert ended(opened, run_id) == "succeeded"
    assert bodies(log) == ["a", "a", "b"]
    assert [attempt["outcome"] for attempt in shown(opened, run_id)["attempts"]] == ["succeeded"], "none was used up"


def test_a_killed_supervisor_leaves_no_worker_behind_and_no_run_unfinished(
    opened: StoreThread, home: Home, log: Path
) -> None:
    gate = home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, workers=2) as supervisor:
        until(lambda: len(workers(opened)) == 2)
        run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
        until(lambda: bodies(log) == ["a"])
        supervisor.process.kill()
        supervisor.process.wait()
        until(lambda: any(gone(pid) for pid in supervisor.spawned))  # the idle one has noticed, so the busy one has
        with gate.open("wb"):
            pass
        until(lambda: all(gone(pid) for pid in supervisor.spawned))
    assert workers(opened) == {}
    assert status(opened, run_id) == ("pending", "queued"), "the step was finished, and saved"
    with supervised(home):
        assert ended(opened, run_id) == "succeeded"
    assert bodies(log) == ["a", "b"]


def test_its_workers_are_believed_alive_as_long_as_they_renew(opened: StoreThread, home: Home) -> None:
    with supervised(home, workers=1, lease=clock.SECOND) as supervisor:
        [first] = until(lambda: workers(opened))
        began = now()
        until(lambda: opened.do_sync(ListWorkers())[0].lease_until > began + 2 * clock.SECOND)
        assert list(workers(opened)) == [first]
        assert len(supervisor.spawned) == 1
