"""`tako runs`: looking, and acting."""

import re
from datetime import datetime
from pathlib import Path

import pytest
from cli import at_terminal, developing, document, done, make_project, run_of, start, tako

# They run processes of their own.
pytestmark = pytest.mark.slow

RUN_KEYS = {
    "id", "workflow", "group", "status", "reason", "attempt", "max_attempts", "created_at", "run_at", "started_at",
    "finished_at", "payload", "result", "error", "unique_key", "release",
}  # fmt: skip
STEP_KEYS = {"name", "kind", "status", "attempt", "started_at", "finished_at", "result", "error"}
ATTEMPT_KEYS = {"n", "worker", "started_at", "finished_at", "outcome", "error"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop")


# --- tako runs: looking ----------------------------------------------------------------------------------------------


def test_ls_has_every_run_newest_first_with_all_its_keys(worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    listed = document("runs", "ls", cwd=project)["runs"]
    assert [run["id"] for run in listed] == list(reversed(runs.values()))
    assert all(set(run) >= RUN_KEYS for run in listed)
    states = {run["workflow"]: (run["status"], run["reason"]) for run in listed}
    assert states["greet"][0] == "succeeded"
    assert states["fail"] == ("dead", "ValueError: no such card (attempt 2 of 2)")
    assert states["ask"] == ("pending", "waiting")
    assert states["nap"] == ("pending", "sleeping")
    assert states["yearly"] == ("pending", "queued")
    greet = next(run for run in listed if run["workflow"] == "greet")
    assert (greet["payload"], greet["result"], greet["unique_key"]) == ("Ada", "hello Ada", "ada")
    assert datetime.fromisoformat(greet["created_at"]).utcoffset() is not None
    assert datetime.fromisoformat(greet["created_at"]) <= datetime.fromisoformat(greet["finished_at"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--status", "dead"], ["fail"]),
        (["--status", "dead,succeeded"], ["fail", "greet"]),
        (["--status", "dead", "--status", "waiting"], ["ask", "fail"]),
        (["--status", "pending"], ["yearly", "nap", "ask"]),
        (["--status", "sleeping,queued"], ["yearly", "nap"]),
        (["--workflow", "ask"], ["ask"]),
        (["--workflow", "ask", "--status", "dead"], []),
        (["--since", "1h", "--limit", "2"], ["yearly", "nap"]),
        (["--since", "2999-01-01"], []),
        (["--since", "2020-01-01T00:00:00Z", "--status", "dead"], ["fail"]),
    ],
)
def test_ls_filters(words: list[str], expected: list[str], worked: tuple[Path, dict[str, str]]) -> None:
    listed = document("runs", "ls", *words, cwd=worked[0])["runs"]
    assert [run["workflow"] for run in listed] == expected


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_table_of_runs_is_readable_at_any_width(columns: int, worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    lines = done("runs", "ls", cwd=project, COLUMNS=str(columns)).splitlines()
    assert lines[0].split()[:6] == ["RUN", "WORKFLOW", "STATUS", "TRY", "AGE", "TOOK"]
    assert max(map(len, lines)) <= columns
    by_workflow = {line.split()[1]: line for line in lines[1:]}
    assert {name: line.split()[2:4] for name, line in by_workflow.items()} == {
        "greet": ["succeeded", "1/3"], "fail": ["dead", "2/2"], "ask": ["waiting", "1/3"], "nap": ["sleeping", "1/3"],
        "yearly": ["queued", "0/3"],
    }  # fmt: skip
    for name, line in by_workflow.items():
        short = line.split()[0]
        assert [one for one in runs.values() if one.endswith(short)] == [runs[name]]
    assert "\x1b" not in "".join(lines)
    if columns == 200:
        assert "ValueError: no such card (attempt 2 of 2)" in by_workflow["fail"]


def test_colour_is_for_terminals_that_want_it(worked: tuple[Path, dict[str, str]]) -> None:
    project, _ = worked
    _, coloured = at_terminal("runs", "ls", cwd=project)
    assert "\x1b[1;31mdead" in coloured
    _, plain = at_terminal("runs", "ls", cwd=project, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)
    assert "dead" in plain


def test_show_has_the_steps_the_attempts_and_what_it_waits_for(worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    failed = run_of(project, runs["fail"][:30])
    assert set(failed) >= RUN_KEYS | {"steps", "attempts", "waiting_for"}
    assert [(step["name"], step["status"]) for step in failed["steps"]] == [("prepare", "done"), ("break", "failed")]
    assert all(set(step) >= STEP_KEYS for step in failed["steps"])
    assert [(one["n"], one["outcome"]) for one in failed["attempts"]] == [(1, "failed"), (2, "failed")]
    assert all(set(one) >= ATTEMPT_KEYS for one in failed["attempts"])
    assert failed["error"]["message"] == "no such card"
    assert failed["waiting_for"] == []
    [wait] = run_of(project, runs["ask"])["waiting_for"]
    assert wait["signal"] == "approval"
    assert datetime.fromisoformat(wait["until"]) > datetime.fromisoformat(wait["since"])


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_show_for_people_is_a_timeline(columns: int, worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    failed = done("runs", "show", runs["fail"], cwd=project, COLUMNS=str(columns))
    assert failed.startswith(f"fail  dead\nrun       {runs['fail']}\n")
    assert re.search(r"^✓  prepare +done +\S+ +\"prepare\"$", failed, re.MULTILINE)
    assert re.search(r"^✗  break +failed +\S+ +attempt 2: ValueError: no such", failed, re.MULTILINE)
    assert failed.count('File "workflows/flows.py", line') == 4  # two frames in each of two attempts
    assert "tako_runtime" not in failed
    assert '{\n  "card": 1\n}' in failed
    asked = done("runs", "show", runs["ask"], cwd=project, COLUMNS=str(columns))
    assert re.search(r"^waits for +approval, until \S+ \S+ \(in 6d23h\)$", asked, re.MULTILINE)
    for text in (failed, asked):
        assert max(len(line) for line in text.splitlines() if "raise" not in line and "await" not in line) <= columns


def test_show_says_in_which_step_a_running_run_is(project: Path) -> None:
    with developing(project) as dev:
        run = start(project, "hold", {})
        dev.wait_for("output", lambda event: event["message"].startswith("child "))
        assert re.search(r"^now +in step held$", done("runs", "show", run, cwd=project), re.MULTILINE)
        (project / "go").touch()
        dev.wait_for("run.succeeded")


def test_what_comes_from_outside_cannot_steer_the_terminal(project: Path) -> None:
    run = start(project, "greet", "\x1b]0;owned\x07 \x9b31m", "--key", "\x1b[31mkey")
    for words in (["runs", "ls"], ["runs", "show", run]):
        text = done(*words, cwd=project)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_a_long_payload_is_cut_for_people_and_whole_for_programs(project: Path) -> None:
    run = start(project, "greet", list(range(1000)))
    text = done("runs", "show", run, cwd=project)
    assert len(text.splitlines()) < 60
    assert "lines more" in text
    assert run_of(project, run)["payload"] == list(range(1000))


def test_a_terminal_without_unicode_gets_plain_marks(worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    text = done("runs", "show", runs["fail"], cwd=project, PYTHONIOENCODING="ascii")
    assert re.search(r"^\+  prepare +done", text, re.MULTILINE)
    assert re.search(r"^x  break +failed", text, re.MULTILINE)


# --- tako runs: acting -----------------------------------------------------------------------------------------------


def test_a_payload_comes_from_the_option_a_file_or_standard_input(project: Path) -> None:
    (project / "payload.json").write_text('"from a file"')
    document("runs", "start", "greet", "--payload", '"as it is"', cwd=project)
    document("runs", "start", "greet", "--payload", "@payload.json", cwd=project)
    document("runs", "start", "greet", "--payload", "-", cwd=project, stdin='"piped"')
    payloads = [run["payload"] for run in document("runs", "ls", cwd=project)["runs"]]
    assert payloads == ["piped", "from a file", "as it is"]


def test_start_tells_the_id_and_that_nothing_runs_here(project: Path) -> None:
    ended = tako("runs", "start", "nap", cwd=project)
    run = ended.stdout.split()[0]
    assert run_of(project, run)["status"] == "pending"
    assert "tako dev" in ended.stderr


def test_start_keeps_what_the_options_say(project: Path) -> None:
    run = run_of(project, start(project, "nap", {}, "--in", "1h30m", "--key", "k", "--priority", "7"))
    assert (run["unique_key"], run["priority"], run["reason"]) == ("k", 7, "queued")
    due = datetime.fromisoformat(run["run_at"]) - datetime.fromisoformat(run["created_at"])
    assert due.total_seconds() == 5400
    again = document("runs", "start", "nap", "--key", "k", cwd=project)
    assert (again["run"]["id"], again["started"]) == (run["id"], False)
    assert "is alive with this key" in done("runs", "start", "nap", "--key", "k", cwd=project)


def test_start_with_wait_ends_as_the_run_does(project: Path) -> None:
    with developing(project) as dev:
        dev.wait_for("dev.ready")
        said = done("runs", "start", "greet", "--payload", '"Ada"', "--wait", cwd=project)
        assert "succeeded after" in said
        assert said.endswith('"hello Ada"\n')
        ended = document("runs", "start", "fail", "--wait", "--payload", "{}", cwd=project, code=1)
        assert ended["run"]["status"] == "dead"
        told = tako("runs", "start", "fail", "--wait", "--payload", "{}", cwd=project)
        assert told.returncode == 1
        assert "dead after" in told.stdout
        assert "no such card" in told.stdout


def test_retry_keeps_finished_steps_and_from_forgets_them(project: Path) -> None:
    run = start(project, "fail", {})
    assert tako("dev", "--once", cwd=project).returncode == 1
    (project / "mended").touch()
    assert document("runs", "retry", run[:36], cwd=project)["runs"][0]["reason"] == "queued"
    done("dev", "--once", cwd=project)
    assert run_of(project, run)["status"] == "succeeded"
    bodies = project / "bodies.txt"
    assert bodies.read_text().split() == ["prepare"]
    assert document("runs", "retry", run, cwd=project, code=1)["error"]["code"] == "refused"
    assert "prepare, break" in document("runs", "retry", run, "--from", "nix", cwd=project, code=4)["error"]["hint"]
    done("runs", "retry", run, "--from", "prepare", cwd=project)
    done("dev", "--once", cwd=project)
    assert bodies.read_text().split() == ["prepare", "prepare"]


def test_bulk_retry_counts_and_asks_before_it_does_anything(project: Path) -> None:
    runs = {start(project, "fail", {}) for _ in range(2)}
    other = start(project, "greet", {"not": "text"})
    assert tako("dev", "--once", cwd=project).returncode == 1

    def dead() -> set[str]:
        return {run["id"] for run in document("runs", "ls", "--status", "dead", cwd=project)["runs"]}

    bulk = ["runs", "retry", "--status", "dead", "--workflow", "fail"]
    assert dead() == {*runs, other}
    nobody = tako(*bulk, cwd=project)
    assert nobody.returncode == 2
    assert "2 dead runs of fail" in nobody.stderr
    assert "--yes" in nobody.stderr
    code, shown = at_terminal(*bulk, cwd=project, answer="n\n")
    assert code == 1
    assert "Retry 2 dead runs of fail?" in shown
    assert dead() == {*runs, other}
    code, _ = at_terminal(*bulk, cwd=project, answer="y\n")
    assert code == 0
    assert dead() == {other}
    assert {run["id"] for run in document("runs", "retry", "--status", "dead", "--yes", cwd=project)["runs"]} == {other}
    assert "no run matches" in tako(*bulk, "--since", "1h", cwd=project).stderr


def test_cancel_takes_several_and_is_not_held_up_by_one_that_has_ended(project: Path) -> None:
    first, second = start(project, "nap", {}), start(project, "ask", {})
    said = done("runs", "cancel", first, "--reason", "ordered twice", cwd=project)
    assert first in said
    assert run_of(project, first)["reason"] == "ordered twice"
    assert document("runs", "cancel", second, "0199", cwd=project, code=4)["error"]["code"] == "not_found"
    assert run_of(project, second)["status"] == "pending"  # all ids are looked up before any is changed
    answer = document("runs", "cancel", first, second, cwd=project, code=1)
    assert [run["id"] for run in answer["runs"]] == [second]
    assert [one["id"] for one in answer["refused"]] == [first]


def test_a_signal_wakes_who_waits_and_is_kept_where_nobody_does(project: Path) -> None:
    kept = document("runs", "signal", "approval", "--payload", '{"by": "Ada"}', cwd=project)["signal"]
    assert kept == {"name": "approval", "woken": 0, "kept": True}
    first = start(project, "ask", {})
    done("dev", "--once", cwd=project)
    assert run_of(project, first)["result"] == {"by": "Ada"}
    start(project, "ask", {})
    done("dev", "--once", cwd=project)
    woken = document("runs", "signal", "approval", cwd=project)["signal"]
    assert woken == {"name": "approval", "woken": 1, "kept": False}
    assert "nobody waits for other" in done("runs", "signal", "other", cwd=project)
