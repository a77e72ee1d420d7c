"""`tako dev`: one log, nothing lost, nobody left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from cli import (
    FLOWS,
    Dev,
    at_terminal,
    developing,
    document,
    done,
    environment,
    is_alive,
    make_project,
    run_of,
    start,
    tako,
)
from conftest import until
from workers import now

from tako_runtime.clock import HOUR, SECOND
from tako_runtime.store import open_store, project_home
from tako_runtime.store.base import KeptSignals, ListWorkers

# They run processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop")


def hold(project: Path, dev: Dev) -> tuple[str, int]:
    """Start a run that stays in its second step: its id, and the process that this step has started."""
    run = start(project, "hold", {})
    said = dev.wait_for("output", lambda event: event["message"].startswith("child "))
    return run, int(said["message"].split()[1])


# --- --once ----------------------------------------------------------------------------------------------------------


def test_once_works_off_what_is_due_and_leaves_the_parked(project: Path) -> None:
    runs = {name: start(project, name, payload) for name, payload in (("greet", "Ada"), ("ask", {}), ("nap", {}))}
    done("dev", "--once", cwd=project)
    ended = {name: (run_of(project, run)["status"], run_of(project, run)["reason"]) for name, run in runs.items()}
    assert ended["greet"][0] == "succeeded"
    assert ended["ask"] == ("pending", "waiting")
    assert ended["nap"] == ("pending", "sleeping")


def test_once_with_nothing_to_do_ends_at_once(project: Path) -> None:
    assert "stopped" in done("dev", "--once", cwd=project)


def test_once_ends_with_1_if_a_run_ended_dead(project: Path) -> None:
    start(project, "fail", {})
    ended = tako("dev", "--once", cwd=project)
    assert ended.returncode == 1
    assert re.search(r"worker +\S+ fail +dead: ValueError: no such card \(attempt 2 of 2\)\n", ended.stdout)
    assert ended.stdout.count('File "workflows/flows.py", line') == 4
    assert "tako_runtime" not in ended.stdout
    assert tako("dev", "--once", cwd=project).returncode == 0  # that one was dead before


def test_once_waits_for_what_is_due_later_and_says_so(project: Path) -> None:
    run = start(project, "greet", "Ada", "--in", "4s")
    with developing(project, "--once") as dev:
        waiting = dev.wait_for("dev.waiting")
        assert waiting["run"] == run
        assert "due at" in waiting["message"]
        dev.wait_for("run.succeeded", lambda event: event["run"] == run)
        assert dev.ended() == 0


def test_once_gives_up_on_runs_that_nobody_can_take(project: Path) -> None:
    start(project, "greet", "Ada")
    flows = project / "workflows" / "flows.py"
    flows.write_text(flows.read_text().replace('"greet"', '"welcome"'))
    ended = tako("dev", "--once", cwd=project)
    assert ended.returncode == 1
    assert "no file declares 'greet' in group default" in ended.stdout


def test_once_gives_up_on_a_group_whose_workers_do_not_start(project: Path) -> None:
    run = start(project, "greet", "Ada")
    flows = project / "workflows" / "flows.py"
    flows.write_text(f"import sys\nif 'worker' in sys.argv:\n    sys.exit('no database')\n{flows.read_text()}")
    ended = tako("dev", "--once", cwd=project)
    assert ended.returncode == 1
    assert "the workers of group default end before they begin" in ended.stdout
    assert "no database" in ended.stdout
    assert run_of(project, run)["status"] == "pending"


def test_a_broken_file_is_named_with_its_line_and_the_others_work(project: Path) -> None:
    (project / "workflows" / "bad.py").write_text("x = 1\ndef f(:\n")
    run = start(project, "greet", "Ada")
    ended = tako("dev", "--once", cwd=project)
    assert ended.returncode == 0
    assert ended.stdout.count("workflows/bad.py:2: cannot be imported") == 1
    assert run_of(project, run)["status"] == "succeeded"


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_is_aligned_and_begins_with_at_most_ten_lines(project: Path) -> None:
    more = "\n".join(f'@workflow("more-{n}")\nasync def more_{n}(step): ...\n' for n in range(6))
    (project / "workflows" / "more.py").write_text(f"from tako_runtime import workflow\n{more}")
    run = start(project, "greet", "Ada")
    lines = done("dev", "--once", cwd=project).splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(r"\d\d:\d\d:\d\d\.\d{3} ", line))
    assert first <= 10
    top = "\n".join(lines[:first])
    for words in ("shop", "ask", "more: tako workflows ls", ".tako/apps/shop/runs.db", "1 queued", "tako runs start"):
        assert words in top
    columns = {line.index("  ", 35) for line in lines if run[-8:] in line}
    about = [line for line in lines[first:] if re.search(f" worker +{run[-8:]} greet", line)]
    assert len(about) >= 4
    assert len(columns) == 1
    assert any("step prepare done in" in line for line in about)
    assert any("succeeded in" in line for line in about)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_log_fits_the_terminal(columns: int, project: Path) -> None:
    named = FLOWS.replace('@workflow("ask")', '@workflow("ask-for-approval")')
    (project / "workflows" / "flows.py").write_text(textwrap.dedent(named))
    start(project, "ask-for-approval", {})
    code, shown = at_terminal("dev", "--once", cwd=project, columns=columns)
    assert code == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert "waits for approval" in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= columns
    assert all(re.match(r"\d\d:\d\d:\d\d[. ]|  |tako dev|$", line) for line in lines), shown  # none begins anew


def test_what_a_handler_prints_is_in_the_log_with_its_run(project: Path) -> None:
    with developing(project) as dev:
        run, child = hold(project, dev)
        said = dev.events[-1]
        assert (said["run"], said["workflow"], said["source"]) == (run, "hold", "default")
        assert said["message"] == f"child {child}"
        (project / "go").touch()
        dev.wait_for("run.succeeded")


def test_what_a_steps_program_prints_is_output_even_where_it_looks_like_an_event(tmp_path: Path) -> None:
    flows = """
        import subprocess
        from tako_runtime import Step, workflow

        LINES = ["no json", '{"event": "login", "run": 5}', '{"event": ["run.dead"]}', '{"event": "run.dead"}']

        @workflow("tell")
        async def tell(step: Step) -> None:
            await step.run("print", subprocess.check_call, ["printf", "%s\\\\n", *LINES])
    """
    project = make_project(tmp_path / "shop", flows)
    start(project, "tell")
    with developing(project, "--once") as dev:
        said = [dev.wait_for("output")["message"] for _ in range(4)]
        dev.wait_for("run.succeeded")
        assert dev.ended() == 0
    assert said == ["no json", '{"event": "login", "run": 5}', '{"event": ["run.dead"]}', '{"event": "run.dead"}']


def test_variables_of_tako_toml_reach_the_workflows_and_the_shell_wins(tmp_path: Path) -> None:
    flows = """
        import os
        from tako_runtime import Step, workflow

        @workflow("tell")
        async def tell(step: Step) -> list[str]:
            return [os.environ["ONE"], os.environ["TWO"], os.environ["THREE"]]
    """
    config = 'name = "shop"\n[vars]\nONE = "file"\nTWO = "file"\nTHREE = "file"\n[vars.development]\nTWO = "dev"\n'
    project = make_project(tmp_path / "shop", flows, config)
    run = start(project, "tell")
    done("dev", "--once", cwd=project, THREE="shell")
    assert run_of(project, run)["result"] == ["file", "dev", "shell"]


def test_limits_of_tako_toml_hold_for_runs_signals_and_results(tmp_path: Path) -> None:
    flows = """
        from tako_runtime import Step, signal, workflow

        @workflow("much", retries=0)
        async def much(step: Step) -> None:
            await signal("from-a-worker")
            await step.run("fetch", lambda: "x" * 2_000)
    """
    config = 'name = "shop"\n[workflows]\nmax_value = "1KiB"\nsignal_retention = "1h"\n'
    project = make_project(tmp_path / "shop", flows, config)
    run = start(project, "much")
    assert tako("dev", "--once", cwd=project).returncode == 1
    error = run_of(project, run)["error"]
    assert error["type"] == "TooLarge"
    assert "the limit is 1,024" in error["message"]
    assert "kept for 1h" in done("runs", "signal", "go", cwd=project)
    with closing(open_store(project_home("shop", project))) as opened:
        kept = opened.do_sync(KeptSignals(now=0))
    assert {one.name: one.expires_at - one.sent_at for one in kept} == {"from-a-worker": HOUR, "go": HOUR}
    much = json.dumps("x" * 2_000)
    for words in (["start", "much"], ["signal", "go"]):
        refused = document("runs", *words, "--payload", much, cwd=project, code=1)
        assert refused["error"]["code"] == "too_large"


def test_the_lease_of_tako_toml_is_that_of_the_workers(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop", config='name = "shop"\n[workflows]\nworkers = 1\nlease = "3s"\n')
    with developing(project) as dev:
        dev.wait_for("worker.started")
        with closing(open_store(project_home("shop", project))) as opened:
            workers = opened.do_sync(ListWorkers())
            assert workers
            assert all(0 < worker.lease_until - now() <= 3 * SECOND for worker in workers)
        dev.send(signal.SIGINT)
        assert dev.ended() == 0


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stop_lets_the_step_end_and_leaves_no_child_behind(number: signal.Signals, project: Path) -> None:
    with developing(project) as dev:
        run, child = hold(project, dev)
        dev.send(number)
        dev.wait_for("worker.draining")
        (project / "go").touch()
        assert dev.ended() == 0
        assert dev.workers
        assert not any(map(is_alive, [*dev.workers, child]))
    assert run_of(project, run)["status"] in ("succeeded", "pending")
    done("dev", "--once", cwd=project)
    ended = run_of(project, run)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    assert (project / "bodies.txt").read_text().split() == ["before", "held"]


def test_two_sigterms_are_as_good_as_one(project: Path) -> None:
    with developing(project) as dev:
        run, _ = hold(project, dev)
        dev.send(signal.SIGTERM)
        dev.wait_for("worker.draining")
        dev.send(signal.SIGTERM)
        (project / "go").touch()
        assert dev.ended() == 0
    assert (project / "bodies.txt").read_text().split() == ["before", "held"], "it came to its step boundary"
    assert run_of(project, run)["status"] == "succeeded"


def test_a_second_ctrl_c_kills_at_once_and_the_run_goes_on_next_time(project: Path) -> None:
    with developing(project) as dev:
        run, child = hold(project, dev)
        dev.send(signal.SIGINT)
        dev.wait_for("worker.draining")
        dev.send(signal.SIGINT)
        assert dev.ended() == 130
        assert not any(map(is_alive, [*dev.workers, child]))
    (project / "go").touch()
    done("dev", "--once", cwd=project)
    ended = run_of(project, run)
    assert ended["status"] == "succeeded"
    assert [attempt["outcome"] for attempt in ended["attempts"]] == ["succeeded"], "to stop uses up no attempt"
    assert (project / "bodies.txt").read_text().split() == ["before", "held", "held"]


def test_after_a_crash_of_everything_the_next_dev_goes_on_at_once(project: Path) -> None:
    with developing(project) as dev:
        run, _ = hold(project, dev)
        [worker] = dev.workers
        os.kill(dev.process.pid, signal.SIGKILL)
        os.killpg(worker, signal.SIGKILL)
        dev.ended()
        until(lambda: not is_alive(worker))
    (project / "go").touch()
    with developing(project, "--once") as dev:
        lost = dev.wait_for("run.reclaimed")
        assert lost["message"].startswith("worker died during attempt 1 in step held")
        assert dev.ended() == 0
    assert run_of(project, run)["status"] == "succeeded"
    assert (project / "bodies.txt").read_text().split() == ["before", "held", "held"]


def test_workers_whose_dev_was_killed_leave_by_themselves(project: Path) -> None:
    with developing(project) as dev:
        start(project, "greet", "Ada")
        dev.wait_for("run.succeeded")
        [worker] = dev.workers
        os.kill(dev.process.pid, signal.SIGKILL)
        until(lambda: not is_alive(worker))


def test_a_second_dev_of_one_project_is_refused_with_the_first_ones_pid(project: Path) -> None:
    with developing(project) as dev:
        dev.wait_for("dev.ready")
        error = document("dev", cwd=project, code=1)["error"]
        assert error["code"] == "refused"
        assert str(dev.process.pid) in error["message"]
        started = tako("runs", "start", "greet", "--payload", '"Ada"', cwd=project)
        assert started.stderr == ""  # one runs here, so there is no advice to start it
        dev.send(signal.SIGTERM)
        assert dev.ended() == 0
    done("dev", "--once", cwd=project)


def test_a_log_that_nobody_reads_any_more_stops_it(project: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tako_cli", "dev"], cwd=project, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "tako dev  shop\n"
    process.stdout.close()
    start(project, "greet", "Ada")
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_groups_of_tako_toml_get_the_workers_that_it_says(tmp_path: Path) -> None:
    flows = textwrap.dedent("""
        import os
        from tako_runtime import Step, workflow

        @workflow("mail", group="email")
        async def mail(step: Step) -> int:
            return os.getpid()
    """)
    project = make_project(tmp_path / "shop", flows, 'name = "shop"\n[workflows.email]\nworkers = 2\nconcurrency = 3\n')
    with developing(project, "--process") as dev:
        begun = [dev.wait_for("worker.started") for _ in range(2)]
        assert {(event["source"], event["concurrency"]) for event in begun} == {("email", 3)}
        run = start(project, "mail")
        dev.wait_for("run.succeeded")
        assert run_of(project, run)["result"] in dev.workers
