"""The command's promises: what it prints, for people and for programs, and with which code it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from cli import at_terminal, document, done, environment, make_project, start, tako

from tako_cli.app import app

# They run processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop")


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
