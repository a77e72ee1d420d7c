"""Groups that cannot work: who says so, where, how often it is tried, and what heals it. With real processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli import developing, make_project, start, tako
from conftest import until
from scenarios.flows import orders
from scenarios.flows.orders import Case
from workers import bodies, freeze, gone, now, shown, supervised, workers

from tako_runtime import GroupUnhealthy, clock, store
from tako_runtime.control import Control
from tako_runtime.store import Home
from tako_runtime.store.base import ListHealth, ListRuns, ReportHealth, Unhealthy
from tako_runtime.store.commit import StoreThread

# They run processes of their own.
pytestmark = pytest.mark.slow

WELL = """
    from tako_runtime import workflow

    @workflow("answers")
    async def answers(payload, step):
        return payload
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose one file the test writes."""
    (tmp_path / "workflows").mkdir()
    return tmp_path


def write(project: Path, text: str) -> str:
    file = project / "workflows" / "flows.py"
    file.write_text(textwrap.dedent(text).lstrip())
    return str(file)


def unhealthy(opened: StoreThread) -> list[Unhealthy]:
    return opened.do_sync(ListHealth())


def reported(opened: StoreThread, group: str = "default") -> Unhealthy:
    [one] = until(lambda: unhealthy(opened))
    assert one.group == group
    return one


def well(opened: StoreThread, run_id: str) -> None:
    """The run is done, and nothing is said against its group any more."""
    until(lambda: shown(opened, run_id)["status"] == "succeeded")
    until(lambda: not unhealthy(opened))


# --- what makes a group unhealthy, and what heals it -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("import nowhere_at_all", "flows.py:1: cannot be imported: ModuleNotFoundError", "import nowhere_at_all"),
        ("x = 1\ndef f(:\n", "flows.py:2: cannot be imported: SyntaxError", "def f(:"),
        ("while True: pass\n", "flows.py:1: cannot be imported: its import takes more than", "while True: pass"),
        ("import sys\nsys.exit('no database')", "SystemExit: no database", "sys.exit('no database')"),
        ("import os\nos._exit(0)", "(exit code 0), while it imported workflows/flows.py", ""),
        (
            "import os\nos.abort()",
            "(killed by SIGABRT), while it imported workflows/flows.py: Fatal Python error: Aborted",
            "flows.py",
        ),
    ],
    ids=["import error", "syntax error", "endless loop", "exit", "silent exit", "crash"],
)
def test_a_worker_that_ends_before_it_claims_makes_its_group_unhealthy_until_the_file_is_mended(
    opened: StoreThread, home: Home, project: Path, text: str, reason: str, detail: str
) -> None:
    write(project, text)
    run_id = orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=project, start_limit=2) as supervisor:
        found = reported(opened)
        assert reason in found.reason
        assert "\n" not in found.reason
        assert detail in found.details
        [told] = supervisor.events("group.unhealthy")
        assert (told["group"], told["reason"], told["last_lines"]) == ("default", found.reason, found.details)
        write(project, WELL)
        well(opened, run_id)
        assert [event["group"] for event in supervisor.events("group.healthy")] == ["default"]


def test_a_worker_that_hangs_so_that_its_own_limit_cannot_end_it_is_ended_and_says_where_it_was(
    opened: StoreThread, home: Home, project: Path
) -> None:
    file = write(project, "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(600)\n")
    run_id = orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=project, start_limit=2) as supervisor:
        found = reported(opened)
        assert found.reason == "its worker was not up after 2 s"
        assert f'File "{file}", line 3 in <module>' in found.details
        until(lambda: gone(supervisor.spawned[0]))
        write(project, WELL)
        well(opened, run_id)


def test_an_interpreter_that_is_missing_makes_the_group_unhealthy_until_it_is_there(
    opened: StoreThread, home: Home, project: Path
) -> None:
    write(project, WELL)
    python = project / "python"
    run_id = orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=project, python=str(python)) as supervisor:
        found = reported(opened)
        assert found.reason == f"its worker cannot be started: No such file or directory: {python}"
        until(lambda: len(supervisor.events("group.paused")) == 2)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o700)
        well(opened, run_id)


def test_the_pauses_grow_and_the_reason_is_said_once(opened: StoreThread, home: Home, project: Path) -> None:
    write(project, "import nowhere_at_all\n")
    orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=project) as supervisor:
        until(lambda: len(supervisor.events("group.paused")) == 3)
        assert [event["pause"] for event in supervisor.events("group.paused")] == ["1s", "2s", "4s"]
        assert len(supervisor.spawned) == 3
        assert len(supervisor.events("group.unhealthy")) == 1
        assert unhealthy(opened)[0].since < now()


def test_many_workers_that_fail_together_are_one_failure_and_then_one_at_a_time_tries(
    opened: StoreThread, home: Home, project: Path
) -> None:
    write(project, "import nowhere_at_all\n")
    with supervised(home, folder="workflows", root=project, workers=3) as supervisor:
        until(lambda: len(supervisor.events("group.paused")) == 2)
        assert len(supervisor.spawned) == 4
        assert [event["pause"] for event in supervisor.events("group.paused")] == ["1s", "2s"]
        write(project, WELL)
        until(lambda: len(workers(opened)) == 3)
        until(lambda: not unhealthy(opened))


def test_a_group_is_not_healthy_because_its_worker_is_up_but_because_it_has_claimed(
    opened: StoreThread, home: Home, project: Path
) -> None:
    """The worker comes up each time and dies before it claims, by a thread of the user's."""
    dies = "import os, signal, threading\nfrom tako_runtime import worker\n"
    dies += "worker.Worker._claim = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
    write(project, dies + textwrap.dedent(WELL))
    run_id = orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=project) as supervisor:
        until(lambda: len(supervisor.events("worker.started")) == 2)
        until(lambda: len(supervisor.events("group.paused")) == 2)
        assert reported(opened).reason == "its worker ended before it claimed anything (killed by SIGKILL)"
        assert supervisor.events("group.healthy") == []
        write(project, WELL)
        well(opened, run_id)


def test_a_group_with_nothing_due_is_tried_too_so_that_it_heals(opened: StoreThread, home: Home, project: Path) -> None:
    """Under `tako dev` no run would come to prove it: enqueue refuses them."""
    write(project, "import nowhere_at_all\n")
    run_id = orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=project):
        reported(opened)
        Control(opened).cancel(run_id)
        write(project, WELL)
        until(lambda: not unhealthy(opened))


def test_one_group_that_cannot_work_does_not_touch_another(opened: StoreThread, home: Home, project: Path) -> None:
    write(
        project,
        """
        import sys
        from tako_runtime import workflow

        if "email:10" in sys.argv:
            raise RuntimeError("no mail server")

        @workflow("answers")
        async def answers(payload, step): ...

        @workflow("in-email", group="email")
        async def in_email(step): ...
        """,
    )
    orders.in_email.enqueue_sync()
    with supervised(home, folder="workflows", root=project):
        found = reported(opened, "email")
        assert "RuntimeError: no mail server" in found.reason
        run_id = orders.answers.enqueue_sync("x")
        until(lambda: shown(opened, run_id)["status"] == "succeeded")


@pytest.mark.parametrize("level", ["warning", "info"])
def test_what_a_worker_must_tell_reaches_the_supervisor_at_every_level_of_the_log(tmp_path: Path, level: str) -> None:
    """And at `warning` the log has none of it."""
    project = make_project(tmp_path / "shop")
    env = {**os.environ, "TAKO_APP_NAME": "shop", "TAKO_DATA_DIR": str(tmp_path / "data")}
    words = [sys.executable, "-m", "tako_runtime", "serve", "--log-level", level]
    home = Home("shop", tmp_path / "data")
    opened = store.open_store(home)
    opened.do_sync(ReportHealth(group="default", host="elsewhere", now=1, reason="theirs"))
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(words, cwd=project, env=env, stdout=out) as server:
        try:
            subprocess.run([sys.executable, "-c", START], cwd=project, env=env, check=True)
            until(lambda: opened.do_sync(ListRuns()))
            until(lambda: not Control(opened).counts())
        finally:
            server.terminate()
        assert server.wait(30) == 0
    said = log.read_text()
    assert ("worker.started" in said) == (level == "info")
    assert "group.paused" not in said
    assert [row.host for row in unhealthy(opened)] == ["elsewhere"], "what another host says is not ours to clear"
    opened.close()


START = "from workflows.flows import greet; greet.enqueue_sync('Ada')"


def test_what_an_earlier_supervisor_of_this_host_has_left_is_cleared_at_the_start_and_the_end(
    opened: StoreThread, home: Home, project: Path
) -> None:
    write(project, "import nowhere_at_all\n")
    orders.answers.enqueue_sync("x")
    with supervised(home, folder="workflows", root=project) as supervisor:
        reported(opened)
        supervisor.process.kill()
        supervisor.process.wait()
    assert unhealthy(opened) != []
    write(project, WELL)
    with supervised(home, folder="workflows", root=project):
        until(lambda: not unhealthy(opened))
        write(project, "import nowhere_at_all\n")
    assert unhealthy(opened) == []


# --- progress --------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_frozen_while_runs_are_due_is_replaced_and_the_log_says_why(
    opened: StoreThread, home: Home
) -> None:
    with supervised(home, workers=1, lease=clock.HOUR, stall_limit=2, grace=clock.SECOND // 2) as supervisor:
        until(lambda: supervisor.events("worker.started"))  # on the list it is a moment earlier
        [(name, pid)] = workers(opened).items()
        freeze(home, pid)
        run_id = orders.answers.enqueue_sync("x")
        until(lambda: shown(opened, run_id)["status"] == "succeeded", seconds=60)  # the next ones must be quick, too
        [stalled] = supervisor.events("worker.stalled")
        assert (stalled["worker"], stalled["pid"], stalled["group"]) == (name, pid, "default")
        [told] = supervisor.events("group.unhealthy")
        assert told["reason"] == "its worker claimed nothing for 2 s, though runs were due and it had free slots"
        until(lambda: gone(pid))
        until(lambda: not unhealthy(opened))


def test_a_worker_whose_event_loop_hangs_while_its_lease_is_renewed_is_replaced_and_says_where_it_hangs(
    opened: StoreThread, home: Home
) -> None:
    log, gate = home.data_dir / "bodies", home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, lease=clock.SECOND, stall_limit=2, grace=clock.SECOND // 2) as supervisor:
        hung = orders.gated_loop.enqueue_sync(Case(str(log), gate=str(gate)))
        until(lambda: bodies(log) == ["loop"])
        other = orders.answers.enqueue_sync("x")
        until(lambda: shown(opened, other)["status"] == "succeeded")
        [told] = supervisor.events("group.unhealthy")
        assert "_bodies.py" in told["last_lines"]
        until(lambda: shown(opened, hung)["status"] == "succeeded")
        assert supervisor.events("worker.frozen") == []
        assert len(supervisor.spawned) == 2
    assert bodies(log) == ["loop", "loop", "b"]


def test_a_worker_all_of_whose_slots_are_busy_is_left_alone_however_much_is_due(
    opened: StoreThread, home: Home
) -> None:
    log, gate = home.data_dir / "bodies", home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, concurrency=1, stall_limit=2, others={"grace": clock.SECOND // 2}) as supervisor:
        busy = orders.gated_loop.enqueue_sync(Case(str(log), gate=str(gate)))
        until(lambda: bodies(log) == ["loop"])
        waiting = orders.answers.enqueue_sync("x")
        mail = orders.in_email.enqueue_sync()
        until(lambda: shown(opened, mail)["status"] == "succeeded")
        [email] = [event["pid"] for event in supervisor.events("worker.spawned") if event["group"] == "email"]
        freeze(home, email)  # another group's worker hangs meanwhile: a sign that the limit has passed
        orders.in_email.enqueue_sync()
        until(lambda: [e for e in supervisor.events("worker.stalled") if e["group"] == "email"])
        assert [e["group"] for e in supervisor.events("worker.stalled")] == ["email"]
        with gate.open("wb"):
            pass
        until(lambda: shown(opened, waiting)["status"] == "succeeded")
        assert [a["outcome"] for a in shown(opened, busy)["attempts"]] == ["succeeded"]


def test_an_idle_worker_that_somebody_kills_says_nothing_about_its_group(opened: StoreThread, home: Home) -> None:
    with supervised(home, workers=1) as supervisor:
        until(lambda: supervisor.events("worker.started"))  # on the list it is a moment earlier
        [pid] = workers(opened).values()
        os.kill(pid, signal.SIGKILL)
        until(lambda: [each for each in workers(opened).values() if each != pid])
        assert supervisor.events("group.unhealthy") == []
    assert unhealthy(opened) == []


# --- enqueue, while one develops -------------------------------------------------------------------------------------


def ask(opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch, env: str | None) -> None:
    """This process is one that `tako` has started in `env`."""
    for name, value in {**home.environment(), **({"TAKO_ENV": env} if env else {})}.items():
        monkeypatch.setenv(name, value)
    store.use(None)


BROKEN: dict[str, Any] = {"group": "default", "host": "here", "now": 1, "reason": "flows.py:3: boom", "details": "a\nb"}


@pytest.mark.parametrize("env", ["production", "staging", None])
def test_in_production_an_enqueue_to_an_unhealthy_group_is_accepted_and_kept(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch, env: str | None
) -> None:
    opened.do_sync(ReportHealth(**BROKEN))
    ask(opened, home, monkeypatch, env)
    try:
        executed: list[str] = []
        real = store.current().do_sync
        monkeypatch.setattr(store.current(), "do_sync", lambda op: executed.append(type(op).__name__) or real(op))
        run_id = orders.answers.enqueue_sync("x")
        assert executed == ["Enqueue"], "and costs no other statement"
    finally:
        store.current().close()
        store.use(opened)
    assert shown(opened, run_id)["status"] == "pending"


async def everywhere(payload: str) -> list[str]:
    """Each way to enqueue: what it raised."""
    raised = []
    for call in (orders.answers.enqueue(payload), orders.answers.enqueue_many([payload])):
        try:
            await call
        except GroupUnhealthy as error:
            raised.append(str(error))
    for sync in (lambda: orders.answers.enqueue_sync(payload), lambda: orders.answers.enqueue_many_sync([payload])):
        try:
            sync()
        except GroupUnhealthy as error:
            raised.append(str(error))
    return raised


def test_while_one_develops_each_enqueue_to_an_unhealthy_group_raises_with_the_reason_and_stores_nothing(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.do_sync(ReportHealth(**BROKEN))
    ask(opened, home, monkeypatch, "development")
    try:
        assert asyncio.run(everywhere("x")) == ["group default cannot work: flows.py:3: boom\na\nb"] * 4
        email = orders.in_email.enqueue_sync()  # another group is not concerned
        opened.do_sync(ReportHealth(**{**BROKEN, "reason": None}))
        healed = orders.answers.enqueue_sync("x")
    finally:
        store.current().close()
        store.use(opened)
    assert {run.id for run in opened.do_sync(ListRuns())} == {email, healed}


def test_under_tako_dev_the_app_and_the_command_learn_why_nothing_runs_and_that_it_does_once_mended(
    tmp_path: Path,
) -> None:
    """The app is a process of its own in the project's folder: it finds its store by tako.toml."""
    flows = """
        import sys
        from tako_runtime import workflow

        if "worker" in sys.argv and {broken}:
            import no_such_driver

        @workflow("greet")
        async def greet(payload, step):
            return payload
    """
    project = make_project(tmp_path / "shop", flows.format(broken=True))
    file = project / "workflows" / "flows.py"
    app = [sys.executable, "-c", START]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TAKO_")}
    with developing(project) as dev:
        dev.wait_for("group.unhealthy")
        opened = store.open_store(store.project_home("shop", project))
        until(lambda: unhealthy(opened))
        refused = subprocess.run(app, cwd=project, env=env, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "GroupUnhealthy: group default cannot work" in refused.stderr
        assert "workflows/flows.py:6: cannot be imported: ModuleNotFoundError: No module named 'no_such_driver'" in (
            refused.stderr
        )
        assert "import no_such_driver\n" in refused.stderr
        assert "No module named 'no_such_driver'" in tako("status", cwd=project, COLUMNS="200").stdout
        by_hand = tako("runs", "start", "greet", cwd=project)
        assert by_hand.returncode == 1
        assert "No module named 'no_such_driver'" in by_hand.stderr
        assert "Nothing was stored" in by_hand.stderr
        file.write_text(textwrap.dedent(flows.format(broken=False)))
        dev.wait_for("group.healthy")
        until(lambda: not unhealthy(opened))
        run = start(project, "greet", "Ada")
        dev.wait_for("run.succeeded", lambda event: event["run"] == run)
        subprocess.run(app, cwd=project, env=env, check=True)
        opened.close()
        dev.send(signal.SIGINT)
        assert dev.ended() == 0


def test_what_a_killed_tako_dev_said_of_a_group_refuses_nothing_any_more(tmp_path: Path) -> None:
    flows = """
        import sys
        from tako_runtime import workflow

        if "worker" in sys.argv:
            import no_such_driver

        @workflow("greet")
        async def greet(payload, step): ...
    """
    project = make_project(tmp_path / "shop", flows)
    app = [sys.executable, "-c", START]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TAKO_")}
    with developing(project) as dev, closing(store.open_store(store.project_home("shop", project))) as opened:
        dev.wait_for("group.unhealthy")
        until(lambda: unhealthy(opened))
        assert subprocess.run(app, cwd=project, env=env, capture_output=True, check=False).returncode == 1
        dev.send(signal.SIGKILL)
        dev.process.wait()
        assert unhealthy(opened), "nobody has taken it back"
        subprocess.run(app, cwd=project, env=env, check=True)
        run = start(project, "greet", "Ada")
        assert "unhealthy" not in tako("status", cwd=project).stdout
        assert json.loads(tako("runs", "why", run, "--json", cwd=project).stdout)["why"]["cause"] == "no_supervisor"
