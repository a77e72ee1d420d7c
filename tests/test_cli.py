"""The command's promises: what it prints, for people and for programs, and with which code it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from cli import at_terminal, developing, document, done, environment, make_project, run_of, start, tako

from tako_cli.app import app

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


def commands() -> list[tuple[str, ...]]:
    """Every command that does something, as its words."""
    found: list[tuple[str, ...]] = []
    todo: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(app))]
    while todo:
        words, command = todo.pop()
        inner = getattr(command, "commands", None)
        todo += [((*words, name), one) for name, one in (inner or {}).items()]
        found += [] if inner else [words]
    return sorted(found)


# --- help and start-up -----------------------------------------------------------------------------------------------


def test_no_words_print_the_help(tmp_path: Path) -> None:
    assert done(cwd=tmp_path) == done("--help", cwd=tmp_path)
    assert "List, show" in done("runs", cwd=tmp_path)


def test_every_command_says_what_it_does_in_a_line_of_80_columns(tmp_path: Path) -> None:
    for group in sorted({words[:-1] for words in commands()}):
        listed = done(*group, "--help", cwd=tmp_path, COLUMNS="80").partition("Commands:")[2].splitlines()[1:]
        assert len(listed) >= 1
        assert [line for line in listed if not line.endswith(".")] == []
        assert [line for line in listed if line.endswith("...")] == []


def test_every_command_has_help_that_fits_80_columns_and_takes_json(tmp_path: Path) -> None:
    assert ("runs", "show") in commands()
    for words in commands():
        text = done(*words, "--help", cwd=tmp_path, COLUMNS="80")
        assert "--json" in text
        assert re.search(r"\n  [A-Z][^\n]+\.\n", text), f"{words} does not say what it does"
        assert max(map(len, text.splitlines())) <= 80, text


def test_help_at_a_terminal_is_coloured_and_keeps_its_examples_lines(tmp_path: Path) -> None:
    code, text = at_terminal("runs", "start", "--help", cwd=tmp_path)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain != text
    assert "\b" not in text
    assert "\n   tako runs start daily-report --in 5m" in plain
    assert "\n\n\n Examples" not in plain


def test_version(tmp_path: Path) -> None:
    assert re.fullmatch(r"tako \d+\.\d+\.\d+\S*\n", done("--version", cwd=tmp_path))


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["runs", "ls", "--help"]], ids=" ".join)
def test_help_loads_nothing_that_it_does_not_need(words: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from tako_cli.app import run
assert run({words!r}) == 0
print(*sorted(sys.modules))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in answer.stdout.splitlines()[-1].split()}
    assert "typer" in loaded
    heavy = "cookiecutter croniter watchfiles jinja2 psycopg cryptography pyrage apsw requests"
    assert not loaded & set(heavy.split())
    if words != ["--version"]:  # its number is the runtime's
        assert not loaded & {"tako_runtime", "asyncio", "msgspec"}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "name", "says"),
    [
        ("runs ls --jsn", 2, "usage", "--jsn"),
        ("runs show", 2, "usage", "ID"),
        ("runs lst", 2, "usage", "lst"),
        ("runs show 0199", 4, "not_found", "0199"),
        ("runs show zz", 4, "not_found", "zz"),
        ("runs retry 0199", 4, "not_found", "0199"),
        ("runs cancel 0199", 4, "not_found", "0199"),
        ("runs retry", 2, "usage", "--status"),
        ("runs retry 0199 --workflow x", 2, "usage", "--status"),
        ("runs ls --status lost", 2, "invalid", "sleeping"),
        ("runs ls --since soon", 2, "invalid", "2h"),
        ("runs ls --limit 0", 2, "usage", "0"),
        ("runs start greet --payload {", 2, "invalid", "JSON"),
        ("runs start greet --payload @nix.json", 4, "not_found", "nix.json"),
        ("runs start greet --in soon", 2, "invalid", "soon"),
        ("runs start gret", 4, "not_found", "greet"),
        ("runs signal a#b", 2, "invalid", "a#b"),
        ("runs signal a --payload {", 2, "invalid", "JSON"),
        ("runs ls --workflow \udcff", 2, "usage", "UTF-8"),
        ('runs start greet --payload "\udcff"', 2, "invalid", "UTF-8"),
        ('runs signal a --payload "\udcff"', 2, "invalid", "UTF-8"),
        ("init Shop", 2, "invalid", "Shop"),
        ("init a --template nix", 4, "not_found", "shop"),
        ("init workflows", 1, "refused", "flows.py"),
    ],
)
def test_an_error_has_a_code_and_says_what_to_do(words: str, code: int, name: str, says: str, project: Path) -> None:
    ended = tako(*words.split(), cwd=project)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    error = document(*words.split(), cwd=project, code=code)["error"]
    assert error["code"] == name
    assert set(error) == {"message", "hint", "code"}
    assert says in error["message"] + error["hint"]
    assert document("runs", "ls", cwd=project) == {"runs": []}


def test_without_a_project_it_says_so(tmp_path: Path) -> None:
    for words in (["runs", "ls"], ["workflows", "ls"], ["dev"], ["runs", "start", "greet"]):
        error = document(*words, cwd=tmp_path, code=3)["error"]
        assert "no tako.toml" in error["message"]
        assert error["hint"]


def test_half_of_the_environment_is_a_bad_configuration(project: Path) -> None:
    ended = tako("runs", "ls", cwd=project, TAKO_APP_NAME="shop")
    assert ended.returncode == 3
    assert "TAKO_DATA_DIR" in ended.stderr


def test_a_mistake_in_tako_toml_is_named_with_its_line(project: Path) -> None:
    (project / "tako.toml").write_text('name = "shop"\n\n[workflows]\nworker = 1\n')
    for words in (["runs", "ls"], ["dev"]):
        error = document(*words, cwd=project, code=3)["error"]
        assert "tako.toml:4: workflows.worker" in error["message"]
        assert "workflows.workers" in error["hint"]


@pytest.mark.parametrize("words", ["dev --once", "status", "runs start greet", "runs signal a"])
def test_a_store_that_this_tako_does_not_have_is_not_replaced_by_another(words: str, project: Path) -> None:
    (project / "tako.toml").write_text('name = "shop"\n\n[storage]\nurl = "postgres"\n')
    error = document(*words.split(), cwd=project, code=3)["error"]
    assert error["code"] == "config"
    assert "storage.url" in error["message"]
    assert not list(project.rglob("runs.db"))
    assert document("config", "show", cwd=project)


def test_a_project_without_its_folder_of_workflows_is_a_bad_configuration(project: Path) -> None:
    (project / "workflows").rename(project / "flows")
    assert "workflows" in document("workflows", "ls", cwd=project, code=3)["error"]["message"]


def test_an_ambiguous_beginning_of_an_id_names_the_runs_it_could_be(worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    error = document("runs", "show", "0", cwd=project, code=1)["error"]
    assert error["code"] == "refused"
    assert runs["greet"] in error["message"]


def broken(project: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in a tako that has a defect."""
    code = f"""
import sys
from tako_cli import app, context
def project(): raise KeyError("unforeseen")
context.project = project
sys.argv = ["tako", *{words!r}]
app.main()
"""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment(**env), capture_output=True, text=True, check=False
    )


def test_a_defect_of_tako_is_told_in_short_and_shown_in_full_on_demand(project: Path) -> None:
    ended = broken(project, "workflows", "ls")
    assert ended.returncode == 1
    assert "KeyError" in ended.stderr
    assert "TAKO_TRACEBACK=1" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Traceback" in broken(project, "workflows", "ls", TAKO_TRACEBACK="1").stderr
    as_json = broken(project, "workflows", "ls", "--json")
    assert json.loads(as_json.stdout)["error"]["code"] == "internal"


def test_on_windows_it_says_to_use_wsl(tmp_path: Path) -> None:
    code = "import sys; from tako_cli import app; sys.platform = 'win32'; app.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 1
    assert "WSL" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_reader_that_leaves_is_no_error_to_speak_of(worked: tuple[Path, dict[str, str]]) -> None:
    read, write = os.pipe()
    os.close(read)
    for words in (["runs", "ls"], ["runs", "ls", "--json"], ["--help"]):
        ended = subprocess.run(
            [sys.executable, "-m", "tako_cli", *words], cwd=worked[0], stdout=write, stderr=subprocess.PIPE,
            env=environment(), check=False, timeout=60,
        )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (1, b"")
    os.close(write)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_standard_stream_that_is_closed_ends_no_command(closed: str, project: Path) -> None:
    for words, code in (("runs ls", 0), ("runs ls --json", 0), ("runs show zz", 4), ("runs show zz --json", 4)):
        command = f"exec {sys.executable} -m tako_cli {words} {closed}"
        ended = subprocess.run(
            ["sh", "-c", command], cwd=project, capture_output=True, env=environment(), check=False, timeout=60
        )
        assert (ended.returncode, b"Traceback" in ended.stderr) == (code, False), ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_below_stdout_is_told_in_one_line(worked: tuple[Path, dict[str, str]]) -> None:
    for words in (["runs", "ls"], ["runs", "ls", "--json"], ["config", "example", "--json"], ["--help"], []):
        with Path("/dev/full").open("wb") as full:
            ended = subprocess.run(
                [sys.executable, "-m", "tako_cli", *words], cwd=worked[0], stdout=full, stderr=subprocess.PIPE,
                env=environment(), check=False, timeout=60,
            )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (1, b"error: No space left on device\n"), words


def test_a_width_of_nought_is_none(worked: tuple[Path, dict[str, str]]) -> None:
    project, runs = worked
    assert runs["ask"][-8:] in done("runs", "ls", cwd=project, COLUMNS="0")


def test_in_a_folder_that_is_gone_it_says_so(tmp_path: Path) -> None:
    command = f"rmdir {tmp_path} && exec {sys.executable} -m tako_cli runs ls"
    env = environment(PYTHONPATH=str(Path(__file__).parent.parent))
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=env, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "current folder is there no more" in ended.stderr


def test_ctrl_c_leaves_cleanly_with_130(project: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tako_cli", "runs", "start", "ask", "--wait"], cwd=project, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert "ask  started" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert [run["workflow"] for run in document("runs", "ls", cwd=project)["runs"]] == ["ask"]


# --- tako init -------------------------------------------------------------------------------------------------------


def test_init_makes_a_project_that_works_and_leaves_nothing_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    said = done("init", "tea-shop", "--yes", cwd=tmp_path, HOME=str(home))
    assert "cd tea-shop" in said
    assert "tako dev" in said
    assert list(home.iterdir()) == []
    shop = tmp_path / "tea-shop"
    assert 'name = "tea-shop"' in (shop / "tako.toml").read_text()
    own_tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=shop, env=environment(),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert own_tests.returncode == 0, own_tests.stdout
    done("runs", "start", "fulfill-order", "--payload", "@order.json", cwd=shop)
    assert "waits for approval:42" in done("dev", "--once", cwd=shop)
    assert {flow["name"] for flow in document("workflows", "ls", cwd=shop)["workflows"]} >= {"fulfill-order"}


def test_init_does_not_touch_a_folder_that_has_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "mine.txt").write_text("mine")
    assert "mine.txt" in document("init", "shop", cwd=tmp_path, code=1)["error"]["message"]
    assert [path.name for path in (tmp_path / "shop").iterdir()] == ["mine.txt"]


def test_init_with_an_empty_name_is_not_this_folder(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert document("init", "", cwd=folder, code=2)["error"]["code"] == "invalid"
    assert list(folder.iterdir()) == []


def test_init_leaves_out_what_was_compiled_of_a_template(tmp_path: Path) -> None:
    template = tmp_path / "mine" / "{{cookiecutter.name}}"
    (template / "workflows" / "__pycache__").mkdir(parents=True)
    (template / "workflows" / "__pycache__" / "flow.cpython-311.pyc").write_bytes(b"\0")
    (template / "workflows" / "flow.py").write_text("")
    (tmp_path / "mine" / "cookiecutter.json").write_text('{"name": "shop"}')
    done("init", "shop", "--template", "./mine", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "shop" / "workflows").iterdir()] == ["flow.py"]


def test_init_with_a_dot_makes_the_project_in_this_folder(tmp_path: Path) -> None:
    here = tmp_path / "corner-shop"
    (here / ".git").mkdir(parents=True)
    made = document("init", ".", cwd=here)["project"]
    assert made == {"name": "corner-shop", "path": str(here)}
    assert 'name = "corner-shop"' in (here / "tako.toml").read_text()


def test_init_takes_the_path_of_a_template_and_asks_the_questions_it_has(tmp_path: Path) -> None:
    template = tmp_path / "template"
    (template / "{{cookiecutter.name}}").mkdir(parents=True)
    (template / "cookiecutter.json").write_text('{"name": "x", "colour": "red"}')
    (template / "{{cookiecutter.name}}" / "tako.toml").write_text("{{cookiecutter.name}} {{cookiecutter.colour}}")
    done("init", "one", "--yes", "--template", "./template", cwd=tmp_path)
    assert (tmp_path / "one" / "tako.toml").read_text() == "one red"
    code, _ = at_terminal("init", "two", "--template", str(template), cwd=tmp_path, answer="\nblue\n")
    assert code == 0
    assert (tmp_path / "two" / "tako.toml").read_text() == "two blue"


# --- tako workflows --------------------------------------------------------------------------------------------------


def test_workflows_are_listed_with_their_schedule_and_place(project: Path) -> None:
    flows = {flow["name"]: flow for flow in document("workflows", "ls", cwd=project)["workflows"]}
    assert set(flows) == {"greet", "fail", "ask", "nap", "hold", "yearly"}
    assert (flows["yearly"]["schedule"], flows["yearly"]["timezone"]) == ("0 0 1 1 *", "Europe/Lisbon")
    assert (flows["yearly"]["group"], flows["fail"]["retries"], flows["greet"]["payload"]) == ("reports", 1, "str")
    table = done("workflows", "ls", cwd=project)
    assert re.search(r"^yearly +0 0 1 1 \* Europe/Lisbon +reports +workflows/flows.py:\d+$", table, re.MULTILINE)


def test_a_file_that_cannot_be_imported_is_named_with_its_line_and_does_not_hide_the_others(project: Path) -> None:
    (project / "workflows" / "bad.py").write_text("import json\n\njson.nothing\n")
    ended = tako("workflows", "ls", cwd=project)
    assert ended.returncode == 1
    assert "workflows/bad.py:3" in ended.stderr
    assert "greet" in ended.stdout
    listed = document("workflows", "ls", cwd=project, code=1)
    assert [mistake["line"] for mistake in listed["mistakes"]] == [3]
    assert len(listed["workflows"]) == 6
    start(project, "greet", "Ada")  # the others work
    assert "bad.py:3" in document("runs", "start", "from-bad", cwd=project, code=4)["error"]["hint"]


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
