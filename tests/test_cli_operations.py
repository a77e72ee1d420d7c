"""`tako status`, `tako signals`, `tako runs why`, `tail` and `prune`: as a person and as a program meets them."""

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli import TAKO, at_terminal, developing, document, done, environment, make_project, start, tako

from tako_runtime.why import CAUSES

# They run processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", config='name = "shop"\n[workflows.media]\nworkers = 2\n')


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A project with a run in each state, by workflow. To be read, not changed."""
    project = make_project(tmp_path_factory.mktemp("worked") / "shop")
    runs = {name: start(project, name, {}) for name in ("fail", "ask", "nap")}
    runs["greet"] = start(project, "greet", "Ada")
    assert tako("dev", "--once", cwd=project).returncode == 1
    runs["yearly"] = start(project, "yearly", None)
    done("runs", "signal", "aproval", "--payload", '{"by": "Ada"}', cwd=project)
    return project, runs


# --- tako status -----------------------------------------------------------------------------------------------------


def test_status_with_nothing_running_says_so_and_where_the_store_is(project: Path) -> None:
    found = document("status", cwd=project)["status"]
    assert found["supervisor"] is None
    assert found["store"] == str(project / ".tako/apps/shop/runs.db")
    assert [one["group"] for one in found["groups"]] == ["default", "media"]
    assert found["groups"][1]["workers"] == {"wanted": 2, "up": 0}
    ended = tako("status", cwd=project)
    assert ended.returncode == 0
    assert "no supervisor runs here. Start one with: tako dev" in ended.stderr
    assert ".tako/apps/shop/runs.db" in ended.stdout


def test_status_of_an_app_that_only_the_environment_names_needs_no_project(tmp_path: Path) -> None:
    ended = tako("status", cwd=tmp_path, TAKO_APP_NAME="shop", TAKO_DATA_DIR=str(tmp_path / "data"))
    assert ended.returncode == 0, ended.stderr
    assert "data/apps/shop/runs.db" in ended.stdout
    assert "Start the app's service on this server." in ended.stderr


def test_status_names_who_supervises_and_the_workers_that_are_up(project: Path) -> None:
    with developing(project) as dev:
        dev.wait_for("dev.ready")
        start(project, "hold", {})
        dev.wait_for("output", lambda event: event["message"].startswith("child "))
        found = document("status", cwd=project)["status"]
        assert found["supervisor"] == {"pid": dev.process.pid, "what": "tako dev"}
        [worker] = [one for one in found["workers"] if one["group"] == "default"]
        assert worker["pid"] in dev.workers
        assert (worker["up"], worker["running"], worker["release"]) == (True, 1, "dev")
        assert found["runs"]["running"] == 1
        shown = done("status", cwd=project)
        assert f"tako dev, process {dev.process.pid}" in shown
        assert re.search(r"^default +1 up +1 of 10 +0$", shown, re.MULTILINE)
        assert re.search(r"^yearly +0 0 1 1 \* Europe/Lisbon +in \d+d", shown, re.MULTILINE)
        (project / "go").touch()
        dev.wait_for("run.succeeded")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_status_is_readable_at_any_width(columns: int, worked: tuple[Path, dict[str, str]]) -> None:
    shown = done("status", cwd=worked[0], COLUMNS=str(columns))
    assert max(map(len, shown.splitlines())) <= columns
    assert "1 queued, 1 sleeping, 1 waiting" in shown
    assert "1 in the last day: tako runs ls --status dead" in shown
    assert "1 signal that nobody took: tako signals ls" in shown
    assert re.search(r"^GROUP +WORKERS +RUNNING +DUE +OLDEST$", shown, re.MULTILINE)


# --- tako signals ls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_signals_are_listed_and_a_mistyped_one_is_pointed_out(
    columns: int, worked: tuple[Path, dict[str, str]]
) -> None:
    project, runs = worked
    found = document("signals", "ls", cwd=project)["signals"]
    [wait] = found["waiting"]
    [kept] = found["kept"]
    assert (wait["signal"], wait["run"], wait["workflow"]) == ("approval", runs["ask"], "ask")
    assert (kept["name"], kept["payload"], kept["near"]) == ("aproval", {"by": "Ada"}, "approval")
    shown = done("signals", "ls", cwd=project, COLUMNS=str(columns))
    assert max(map(len, shown.splitlines())) <= columns
    assert "kept aproval, and a run waits for approval: mistyped?" in shown


def test_signals_that_are_not_shown_are_said_to_be_there(project: Path) -> None:
    assert "no run waits" in tako("signals", "ls", cwd=project).stderr
    for name in ("a", "b", "c"):
        done("runs", "signal", name, cwd=project)
    ended = tako("signals", "ls", "--limit", "2", cwd=project)
    assert len(re.findall(r"^[abc] ", ended.stdout, re.MULTILINE)) == 2
    assert "--limit" in ended.stderr
    assert len(document("signals", "ls", "--limit", "2", cwd=project)["signals"]["kept"]) == 2
    assert "--limit" not in tako("signals", "ls", "--limit", "3", cwd=project).stderr


# --- tako runs why ---------------------------------------------------------------------------------------------------


def test_the_hint_for_a_run_that_waits_is_a_command_that_sends_it_the_signal(tmp_path: Path) -> None:
    flows = """
        from tako_runtime import Step, workflow

        @workflow("ask")
        async def ask(step: Step):
            return await step.wait_for("ada's approval")
    """
    project = make_project(tmp_path / "shop", flows)
    run = start(project, "ask")
    done("dev", "--once", cwd=project)
    assert document("runs", "why", run, cwd=project)["why"]["signals"] == ["ada's approval"]
    [command] = re.findall(r"^Send it with: (.*)$", tako("runs", "why", run, cwd=project).stderr, re.MULTILINE)
    _, *words = shlex.split(command)
    assert "woke 1 run" in done(*words, cwd=project)


@pytest.mark.parametrize(
    ("workflow", "cause", "says"),
    [
        ("greet", "succeeded", "It succeeded at"),
        ("fail", "dead", "ValueError: no such card (attempt 2 of 2)"),
        ("ask", "waiting", "It waits for signal approval until"),
        ("nap", "sleeping", "It sleeps until"),
        ("yearly", "no_supervisor", "first in the queue of group reports; no worker is up and none comes"),
    ],
)
def test_why_is_one_sentence(workflow: str, cause: str, says: str, worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    found = document("runs", "why", runs[workflow][:30], cwd=project)["why"]
    assert set(found) == {"run", "workflow", "status", "cause", "sentence", "signals"}
    assert (found["run"], found["workflow"], found["cause"]) == (runs[workflow], workflow, cause)
    assert says in found["sentence"]
    shown = done("runs", "why", runs[workflow], cwd=project)
    assert says in shown
    assert not re.search(r"\dZ", shown), "times are those of the reader"


def test_why_names_the_step_the_worker_and_who_cancels(project: Path) -> None:
    with developing(project) as dev:
        run = start(project, "hold", {})
        dev.wait_for("output", lambda event: event["message"].startswith("child "))
        found = document("runs", "why", run, cwd=project)["why"]
        assert found["cause"] == "running"
        assert re.match(r"It is in step held since 2\S+Z, in worker w-\S+ \(process \d+ on", found["sentence"])
        done("runs", "cancel", run, "--reason", "by Ada", cwd=project)
        found = document("runs", "why", run, cwd=project)["why"]
        assert found["cause"] == "cancelling"
        assert "(by Ada)" in found["sentence"]
        (project / "go").touch()
        dev.wait_for("run.succeeded")  # that step was its last one
    parked = start(project, "nap", {})
    done("runs", "cancel", parked, "--reason", "by Ada", cwd=project)
    found = document("runs", "why", parked, cwd=project)["why"]
    assert "It was cancelled (by Ada), at" in found["sentence"]


def test_why_names_the_file_that_may_have_the_workflow_and_cannot_be_imported(project: Path) -> None:
    run = start(project, "greet", "Ada")
    (project / "workflows" / "flows.py").write_text("import json\n\njson.nothing\n")
    found = document("runs", "why", run, cwd=project)["why"]
    assert found["cause"] == "no_workflow"
    assert "no workflow greet in group default is declared in this release" in found["sentence"]
    assert "flows.py:3" in found["sentence"]


def test_the_causes_are_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "operating.md").read_text()
    assert [cause for cause in CAUSES if f"`{cause}`" not in page] == []


# --- tako runs tail --------------------------------------------------------------------------------------------------


def events(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


def test_tail_follows_a_run_to_its_end_live(project: Path) -> None:
    with developing(project) as dev:
        dev.wait_for("dev.ready")
        run = start(project, "hold", {})
        dev.wait_for("output", lambda event: event["message"].startswith("child "))
        words = [*TAKO, "runs", "tail", run, "--json"]
        tail = subprocess.Popen(words, cwd=project, env=environment(), stdout=subprocess.PIPE, text=True)
        assert tail.stdout is not None
        told = []
        while not told or told[-1]["event"] != "step.done":
            told.append(json.loads(tail.stdout.readline()))
        (project / "go").touch()
        rest, _ = tail.communicate(timeout=60)
        assert tail.returncode == 0
        told += events(rest)
        assert told[0]["event"] == "tail.live"
        assert told[0]["pid"] == dev.process.pid
        own = [(event["event"], event.get("step")) for event in told[1:]]
        assert own == [
            ("run.enqueued", None), ("run.started", None), ("step.done", "before"), ("step.done", "held"),
            ("run.succeeded", None),
        ]  # fmt: skip
        assert {event["run"] for event in told[1:]} == {run}


def test_tail_of_all_runs_goes_on_until_ctrl_c(project: Path) -> None:
    with developing(project) as dev:
        dev.wait_for("dev.ready")
        words = [*TAKO, "runs", "tail", "--json"]
        tail = subprocess.Popen(
            words, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert tail.stdout is not None
        assert json.loads(tail.stdout.readline())["event"] == "tail.live"
        first, second = start(project, "greet", "Ada"), start(project, "greet", "Bea")
        ended = set()
        while ended != {first, second}:
            event = json.loads(tail.stdout.readline())
            ended |= {event["run"]} if event["event"] == "run.succeeded" else set()
        tail.send_signal(signal.SIGINT)
        _, said = tail.communicate(timeout=60)
        assert (tail.returncode, said) == (130, "")


def test_tail_without_a_supervisor_tells_what_the_store_has(worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    ended = tako("runs", "tail", runs["fail"], cwd=project, COLUMNS="80")
    assert ended.returncode == 0
    assert "no supervisor runs here" in ended.stderr
    lines = [line for line in ended.stdout.splitlines() if not line.startswith(" ")]
    assert [re.sub(r"^\S+ worker \S+ fail  ", "", line)[:24] for line in lines] == [
        "enqueued", "attempt 1 of 2 started", "step prepare done in " + lines[2].split()[-1][:3],
        "attempt 1 of 2 failed, a", "attempt 2 of 2 started", "step break failed: Value", "dead: ValueError: no suc",
    ]  # fmt: skip
    assert 'File "workflows/flows.py", line' in ended.stdout
    assert max(len(line) for line in lines) <= 80
    assert tako("runs", "tail", "0199", cwd=project).returncode == 4


# --- tako runs prune -------------------------------------------------------------------------------------------------


def test_prune_counts_asks_and_deletes_only_what_has_ended(project: Path) -> None:
    start(project, "fail", {})
    start(project, "greet", "Ada")
    nap = start(project, "nap", {})
    tako("dev", "--once", cwd=project)

    def left() -> list[str]:
        return sorted(run["workflow"] for run in document("runs", "ls", cwd=project)["runs"])

    assert "0 runs ended before then" in done("runs", "prune", "--before", "1d", cwd=project)
    dry = document("runs", "prune", "--before", "0s", "--dry-run", cwd=project)
    assert dry == {"pruned": {"runs": 0, "found": 2, "dry_run": True}}
    nobody = tako("runs", "prune", "--before", "2999-01-01", cwd=project)
    assert nobody.returncode == 2
    assert "would delete 2 runs" in nobody.stderr
    assert "--yes" in nobody.stderr
    code, shown = at_terminal("runs", "prune", "--before", "0s", cwd=project, answer="n\n")
    assert code == 1
    assert "Delete 2 runs?" in shown
    assert left() == ["fail", "greet", "nap"]
    answer = document("runs", "prune", "--before", "0s", "--status", "dead", "--workflow", "fail", "-y", cwd=project)
    assert answer == {"pruned": {"runs": 1, "found": 1, "dry_run": False}}
    assert left() == ["greet", "nap"]
    code, shown = at_terminal("runs", "prune", "--before", "0s", cwd=project, answer="y\n")
    assert code == 0
    assert "1 run deleted" in shown
    assert [run["id"] for run in document("runs", "ls", cwd=project)["runs"]] == [nap]


@pytest.mark.parametrize(
    ("words", "says"),
    [("--before soon", "2h"), ("--before 1d --status waiting", "no end"), ("--status dead", "--before")],
)
def test_prune_without_a_sense_is_wrong_usage(words: str, says: str, project: Path) -> None:
    ended = tako("runs", "prune", *words.split(), cwd=project)
    assert ended.returncode == 2
    assert says in ended.stderr
