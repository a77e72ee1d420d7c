"""`tako dev` puts what is saved to work at once: what is new, what goes on, what stays as it was."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pexpect
import pytest
from cli import TAKO, Dev, Event, developing, done, environment, is_alive, make_project, run_of, start, tako
from conftest import until

# They run processes of their own.
pytestmark = pytest.mark.slow

FLOWS = """
    import os
    from tako_runtime import Step, workflow
    from shop.prices import PRICE

    @workflow("price")
    async def price(step: Step):
        return {"price": PRICE, "version": 1, "pid": os.getpid(), "env": os.environ.get("COLOUR")}

    @workflow("later")
    async def later(step: Step):
        await step.wait_for("now")
        return await price(step)
"""

#: Its first step begins and waits for a file; then come two more.
LONG = """
    import time
    from pathlib import Path
    from tako_runtime import Step, workflow

    def ran(line):
        with Path("bodies.txt").open("a") as file:
            file.write(f"{line} VERSION\\n")

    def held():
        ran("held")
        Path("holding").touch()
        while not Path("go").exists():
            time.sleep(0.01)

    @workflow("long", retries=0)
    async def long(step: Step):
        await step.run("first", ran, "first")
        await step.run("held", held)
        await step.run("last", ran, "last")
        return "VERSION"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A shop whose workflows import a module of its own."""
    project = make_project(tmp_path / "shop", FLOWS)
    (project / "shop").mkdir()
    (project / "shop" / "prices.py").write_text("PRICE = 10\n")
    return project


def flows(project: Path) -> Path:
    return project / "workflows" / "flows.py"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def ready(dev: Dev) -> None:
    """Its worker is up, and what is saved from now on is seen."""
    dev.wait_for("worker.started")


def price(project: Path, dev: Dev) -> dict[str, Any]:
    """What a new run gives."""
    run = start(project, "price")
    dev.wait_for("run.succeeded", lambda event: event["run"] == run)
    return dict(run_of(project, run)["result"])


def named(dev: Dev, name: str) -> list[Event]:
    return [event for event in dev.events if event["event"] == name]


# --- what is new -----------------------------------------------------------------------------------------------------


def test_a_saved_workflow_and_a_module_that_it_imports_are_at_work_in_the_next_run(project: Path) -> None:
    with developing(project) as dev:
        ready(dev)
        before = price(project, dev)
        edit(flows(project), '"version": 1', '"version": 2')
        dev.wait_for("code.reloaded")
        between = price(project, dev)
        edit(project / "shop" / "prices.py", "10", "12")
        dev.wait_for("code.reloaded")
        after = price(project, dev)
    assert [(seen["version"], seen["price"]) for seen in (before, between, after)] == [(1, 10), (2, 10), (2, 12)]
    assert len({seen["pid"] for seen in (before, between, after)}) == 3, "each has imported everything anew"
    assert not any(map(is_alive, dev.workers))


def test_a_new_workflow_in_a_new_group_and_one_that_is_gone(project: Path) -> None:
    more = """
        from tako_runtime import workflow

        @workflow("mail", group="email")
        async def mail(step): ...
    """
    (project / "tako.toml").write_text('name = "shop"\n[workflows]\nconcurrency = 7\n')
    with developing(project) as dev:
        ready(dev)
        (project / "workflows" / "mail.py").write_text(textwrap.dedent(more))
        begun = dev.wait_for("worker.started", lambda event: event["group"] == "email")
        assert begun["concurrency"] == 7, "as [workflows] says, since no other place does"
        run = start(project, "mail")
        dev.wait_for("run.succeeded", lambda event: event["run"] == run)
        (project / "workflows" / "mail.py").unlink()
        dev.wait_for("code.reloaded")
        assert "mail" in tako("runs", "start", "mail", cwd=project).stderr
        assert price(project, dev)["version"] == 1


def test_tako_toml_is_read_anew_and_a_broken_one_leaves_what_was_in_it_before(project: Path) -> None:
    config = project / "tako.toml"
    with developing(project) as dev:
        ready(dev)
        config.write_text('name = "shop"\n[vars]\nCOLOUR = "red"\n[workflows]\nconcurrency = 3\n')
        assert dev.wait_for("worker.started")["concurrency"] == 3
        assert price(project, dev)["env"] == "red"
        config.write_text('name = "shop"\n[vars]\nCOLOUR = "blue"\n[workflows]\nconcurrency = "many"\n')
        broken = dev.wait_for("config.broken")
        assert "tako.toml:5: workflows.concurrency" in broken["message"]
        config.write_text('name = "shop"\n[vars]\nCOLOUR = "blue"\n[metrics]\nlisten = "127.0.0.1:9"\n')
        assert dev.wait_for("config.later")["message"].startswith("[metrics] in tako.toml")
        dev.wait_for("code.reloaded")
        assert price(project, dev)["env"] == "blue"


def test_saves_in_a_burst_are_one_reload(project: Path) -> None:
    with developing(project) as dev:
        ready(dev)
        for n in range(2, 30):
            edit(flows(project), f'"version": {n - 1}', f'"version": {n}')
        dev.wait_for("code.reloaded")
        assert price(project, dev)["version"] == 29
        assert len(named(dev, "code.reloaded")) == 1


def test_with_process_workers_are_those_of_production_and_new_code_is_at_work_all_the_same(project: Path) -> None:
    with developing(project, "--process") as dev:
        dev.wait_for("dev.ready")
        assert price(project, dev)["version"] == 1
        edit(flows(project), '"version": 1', '"version": 2')
        dev.wait_for("worker.stopped")
        assert price(project, dev)["version"] == 2
        edit(project / "shop" / "prices.py", "10", "(")
        dev.wait_for("code.kept")
        edit(project / "shop" / "prices.py", "(", "12")
        dev.wait_for("code.declared")
        assert price(project, dev)["price"] == 12


def test_the_app_is_started_again_with_the_new_code(tmp_path: Path) -> None:
    command = json.dumps(["python", "-u", "-c", "import time, prices; print('price', prices.PRICE); time.sleep(3600)"])
    config = f'name = "shop"\n[app]\ncommand = {command}\n'
    project = make_project(tmp_path / "shop", "import prices\n", config)
    (project / "prices.py").write_text("PRICE = 10\n")
    with developing(project) as dev:
        dev.wait_for("output", lambda event: event["message"] == "price 10")
        ready(dev)
        (project / "prices.py").write_text("PRICE = 12\n")
        dev.wait_for("output", lambda event: event["message"] == "price 12")
        assert named(dev, "app.ended") == []


# --- what goes on ----------------------------------------------------------------------------------------------------


def test_a_run_stops_at_its_next_step_boundary_and_goes_on_under_the_new_code(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop", LONG.replace("VERSION", "1"))
    with developing(project) as dev:
        ready(dev)
        run = start(project, "long")
        until((project / "holding").exists)
        flows(project).write_text(textwrap.dedent(LONG.replace("VERSION", "2")))
        dev.wait_for("code.reloaded")
        (project / "go").touch()
        dev.wait_for("run.succeeded")
    assert (project / "bodies.txt").read_text().splitlines() == ["first 1", "held 1", "last 2"]
    ended = run_of(project, run)
    assert ended["result"] == "2"
    assert [attempt["outcome"] for attempt in ended["attempts"]] == ["succeeded"], "no attempt was used up"


def test_a_step_that_does_not_stop_within_five_seconds_is_cut_off_named_and_run_again(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop", LONG.replace("VERSION", "1"))
    with developing(project) as dev:
        ready(dev)
        run = start(project, "long")
        until((project / "holding").exists)
        [worker] = dev.workers
        flows(project).write_text(textwrap.dedent(LONG.replace("VERSION", "2")))
        cut = dev.wait_for("run.cut_off")
        assert (cut["run"], cut["where"]) == (run, "in step held")
        assert not is_alive(worker)
        (project / "go").touch()
        dev.wait_for("run.succeeded")
    assert (project / "bodies.txt").read_text().splitlines() == ["first 1", "held 1", "held 2", "last 2"]
    assert [attempt["outcome"] for attempt in run_of(project, run)["attempts"]] == ["succeeded"]


def test_a_step_that_was_done_and_is_not_asked_for_any_more_is_named_when_its_run_goes_on(tmp_path: Path) -> None:
    code = """
        from tako_runtime import Step, workflow

        @workflow("order")
        async def order(step: Step):
            await step.run("charge", str, "x")
            await step.wait_for("go")
            await step.run("ship", str, "x")
    """
    project = make_project(tmp_path / "shop", code)
    with developing(project) as dev:
        ready(dev)
        run = start(project, "order")
        dev.wait_for("run.waiting")
        edit(flows(project), '"charge"', '"take-money"')
        dev.wait_for("code.reloaded")
        done("runs", "signal", "go", cwd=project)
        said = dev.wait_for("run.diverged")
        assert said["run"] == run
        assert said["steps"] == "charge"


# --- what stays as it was --------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_imported_leaves_the_code_as_it_was_and_mending_it_clears_that(project: Path) -> None:
    whole = flows(project).read_text()
    with developing(project) as dev:
        ready(dev)
        for _ in range(2):  # the second time it is news again
            run = start(project, "later")
            dev.wait_for("run.waiting")
            flows(project).write_text(whole + "price = (\n")
            broken = dev.wait_for("file.broken")
            assert broken["line"] == len(whole.splitlines()) + 1
            assert "SyntaxError" in broken["traceback"]
            dev.wait_for("code.kept")
            done("runs", "signal", "now", cwd=project)
            dev.wait_for("run.succeeded")
            assert run_of(project, run)["result"]["version"] == 1
            flows(project).write_text(whole.replace('"version": 1', '"version": 2'))
            dev.wait_for("code.reloaded")
            assert price(project, dev)["version"] == 2
            flows(project).write_text(whole)
            dev.wait_for("code.reloaded")
        assert named(dev, "group.unhealthy") == []
        assert len(named(dev, "file.broken")) == 2, "each is told once"


def test_a_file_that_was_broken_from_the_start_holds_up_no_other(project: Path) -> None:
    (project / "workflows" / "other.py").write_text("import no_such_module\n")
    with developing(project) as dev:
        ready(dev)
        assert price(project, dev)["version"] == 1
        edit(flows(project), '"version": 1', '"version": 2')
        dev.wait_for("code.reloaded")
        assert price(project, dev)["version"] == 2
        (project / "no_such_module.py").write_text("")
        dev.wait_for("code.reloaded")


@pytest.mark.parametrize("ends", ["os.kill(os.getpid(), 9)", "os._exit(0)", "raise SystemExit"])
def test_a_file_that_ends_the_process_that_imports_it_leaves_the_code_as_it_was(project: Path, ends: str) -> None:
    whole = flows(project).read_text()
    with developing(project) as dev:
        ready(dev)
        run = start(project, "later")
        dev.wait_for("run.waiting")
        flows(project).write_text(f"import os\n{ends}\n")
        dev.wait_for("code.kept")
        done("runs", "signal", "now", cwd=project)
        dev.wait_for("run.succeeded")
        assert run_of(project, run)["result"]["version"] == 1
        flows(project).write_text(whole.replace('"version": 1', '"version": 2'))
        dev.wait_for("code.reloaded")
        assert price(project, dev)["version"] == 2
        assert named(dev, "group.unhealthy") == []


def test_where_no_code_is_good_the_first_good_save_begins(project: Path) -> None:
    whole = flows(project).read_text()
    flows(project).write_text("price = (\n")
    with developing(project) as dev:
        dev.wait_for("group.unhealthy")
        flows(project).write_text(whole)
        ready(dev)
        until(lambda: tako("runs", "start", "price", cwd=project).returncode == 0)
        dev.wait_for("run.succeeded")


def test_what_the_code_does_not_import_causes_no_reload(project: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    (project / ".gitignore").write_text("build/\n")
    for folder in ("build", "tests", ".venv/lib", "node_modules"):
        (project / folder).mkdir(parents=True)
    with developing(project) as dev:
        ready(dev)
        writes = "from workflows.flows import price\nfor _ in range(100):\n    price.enqueue_sync()"
        subprocess.run([sys.executable, "-c", writes], cwd=project, check=True)
        (project / ".tako" / "made.py").write_text("")
        for name in ("build/made.py", "tests/test_shop.py", ".venv/lib/x.py", "node_modules/x.py", "notes.txt", "x.py"):
            (project / name).write_text("x = 1\n")
        edit(flows(project), '"version": 1', '"version": 2')  # seen after all of the others
        dev.wait_for("code.reloaded")
        assert price(project, dev)["version"] == 2
        assert len(named(dev, "code.reloaded")) == 1


def test_a_spare_that_has_died_is_done_without(project: Path) -> None:
    with developing(project) as dev:
        ready(dev)
        [worker] = dev.workers
        spare = until(lambda: [pid for pid in children(dev.process.pid) if pid != worker])
        os.kill(spare[0], signal.SIGKILL)
        edit(flows(project), '"version": 1', '"version": 2')
        dev.wait_for("code.reloaded")
        assert spare[0] not in dev.workers
        assert price(project, dev)["version"] == 2


def test_when_everything_is_killed_no_process_is_left_and_none_when_it_is_told_to_stop(project: Path) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        with developing(project) as dev:
            ready(dev)
            both = until(lambda: found if len(found := children(dev.process.pid)) == 2 else None)
            dev.send(number)
            dev.ended()
            until(lambda both=both: not any(map(is_alive, both)), seconds=5)


def children(pid: int) -> list[int]:
    said = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in said.split()]


# --- the debugger ----------------------------------------------------------------------------------------------------


def test_a_breakpoint_in_a_step_has_the_terminal_and_the_log_goes_on_after_it(tmp_path: Path) -> None:
    code = """
        from tako_runtime import Step, workflow

        def charge(amount):
            breakpoint()
            print("charged", amount)
            return amount

        @workflow("order")
        async def order(step: Step):
            return await step.run("charge", charge, 42)
    """
    project = make_project(tmp_path / "shop", code)
    dev = pexpect.spawn(
        TAKO[0],
        [*TAKO[1:], "dev"],
        cwd=str(project),
        env=environment(),
        encoding="utf-8",
        timeout=30,
        dimensions=(40, 120),
    )
    try:
        dev.expect("group default started")
        run = start(project, "order")
        dev.expect(r"stands at workflows/flows.py:6")
        dev.expect(r"print\(.charged., amount\)")
        dev.expect_exact("(Pdb) ")
        dev.sendline("p amount * 2")
        dev.expect_exact("84")
        dev.expect_exact("(Pdb) ")
        dev.sendline("amount = 43")
        dev.expect_exact("(Pdb) ")
        dev.sendline("c")
        dev.expect("charged 43")
        dev.expect("succeeded")
        assert run_of(project, run)["result"] == 43
        dev.sendintr()
        dev.expect("stopped")
        dev.expect(pexpect.EOF)
        dev.wait()
        assert dev.exitstatus == 0
    finally:
        dev.close(force=True)


def test_where_there_is_no_terminal_a_breakpoint_is_told_of_and_passed_over(project: Path) -> None:
    edit(flows(project), "    return {", "    breakpoint()\n    return {")
    with developing(project) as dev:
        ready(dev)
        assert price(project, dev)["version"] == 1
        [ignored] = named(dev, "debugger.ignored")
        assert ignored["file"] == "workflows/flows.py"
        assert ignored["line"] == flows(project).read_text().splitlines().index("    breakpoint()") + 1
