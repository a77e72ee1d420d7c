"""What `workflows/` declares, read as a deploy reads it: by a process of its own, with every mistake in the answer."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import unprivileged

from tako_runtime.errors import ConfigError
from tako_runtime.manifest import IMPORT_LIMIT, Manifest, discover, read
from tako_runtime.store import Home
from tako_runtime.workflow import registry

GOOD = """
    from dataclasses import dataclass

    from tako_runtime import Backoff, Step, workflow

    @dataclass
    class Order:
        total: float

    @workflow("fulfill-order", retries=4, backoff=Backoff(base="2s", max="5m"), group="orders", timeout="1h")
    async def fulfill(payload: Order, step: Step) -> str:
        return "done"

    @workflow("report", schedule="0 9 * * 1-5", timezone="Europe/Berlin", catchup="skip", overlap="skip")
    def report(step): ...
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "workflows").mkdir()
    write(tmp_path, "good", GOOD)
    return tmp_path


def write(project: Path, name: str, text: str) -> str:
    """A file of the project's; its path."""
    file = project / "workflows" / f"{name}.py"
    file.write_text(textwrap.dedent(text).lstrip())
    return str(file)


def declaring(name: str, **settings: str) -> str:
    said = "".join(f", {key}={value!r}" for key, value in settings.items())
    return f"from tako_runtime import workflow\n\n@workflow({name!r}{said})\nasync def flow(step): ...\n"


def printed(project: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """The one JSON document that the command prints."""
    command = [sys.executable, "-m", "tako_runtime", "manifest", *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for mistake in found["mistakes"]:
        assert f"{mistake['file']}:{mistake['line']}: {mistake['message']}\n" in done.stderr
    return found


def mistake(project: Path, *words: str) -> dict[str, Any]:
    """The one mistake of a project; the good file is there all the same."""
    found = printed(project, *words, code=1)
    assert {"fulfill-order", "report"} <= {flow["name"] for flow in found["workflows"]}
    [one] = found["mistakes"]
    return dict(one)


def test_it_says_all_that_a_workflow_declares(project: Path) -> None:
    order, report = printed(project)["workflows"]
    assert order == {
        "name": "fulfill-order", "group": "orders", "retries": 4, "backoff_base": 2_000_000,
        "backoff_max": 300_000_000, "payload": "Order", "file": str(project / "workflows/good.py"), "line": 9,
        "signature": "(payload: workflows.good.Order, step: tako_runtime.step.Step) -> str", "doc": "",
        "schedule": None, "timezone": None, "catchup": "latest", "overlap": "allow", "timeout": 3_600_000_000,
        "blocking": False, "local": False, "example": '{"total":1}',
    }  # fmt: skip
    told = {key: report[key] for key in ("schedule", "timezone", "catchup", "overlap", "group", "signature")}
    assert told == {
        "schedule": "0 9 * * 1-5", "timezone": "Europe/Berlin", "catchup": "skip", "overlap": "skip",
        "group": "default", "signature": "(step)",
    }  # fmt: skip


def test_what_a_module_prints_at_its_import_is_not_in_the_json(project: Path) -> None:
    write(project, "loud", "import os\nprint('hello')\nos.write(1, b'raw')\n")
    assert printed(project)["mistakes"] == []


def test_an_import_error_is_told_with_file_line_and_reason(project: Path) -> None:
    file = write(project, "bad", "x = 1\nimport a_module_that_is_not_there\n")
    one = mistake(project)
    assert (one["file"], one["line"]) == (file, 2)
    assert one["message"] == (
        "cannot be imported: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    )  # fmt: skip
    assert "import a_module_that_is_not_there" in one["traceback"]


def test_an_error_in_what_a_workflow_file_imports_is_told_where_it_is(project: Path) -> None:
    (project / "prices.py").write_text("RATE = 1\nRATE.missing\n")
    write(project, "bad", "import prices\n")
    one = mistake(project)
    assert (one["file"], one["line"]) == (str(project / "prices.py"), 2)


def test_a_syntax_error_is_told_with_file_line_and_reason(project: Path) -> None:
    file = write(project, "bad", "x = 1\ndef f(:\n")
    one = mistake(project)
    assert (one["file"], one["line"]) == (file, 2)
    assert "SyntaxError: invalid syntax" in one["message"]


@pytest.mark.parametrize(
    "name",
    [
        "send-mail.py", "by-hand/mail.py", "two words.py",
        pytest.param("\udcff.py", marks=pytest.mark.skipif(sys.platform == "darwin", reason="no such file there")),
    ],
)  # fmt: skip
def test_a_file_whose_name_is_no_modules_is_told_and_not_passed_over(project: Path, name: str) -> None:
    file = project / "workflows" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(textwrap.dedent(declaring("mail")))
    one = mistake(project)
    assert one["message"].startswith("cannot be imported: a module's name")
    assert (Path(one["file"]).parent, one["line"]) == (file.parent, 0)


def test_a_file_that_is_hidden_or_begins_with_an_underscore_is_left_alone(project: Path) -> None:
    for name in ("_shared.py", ".#mail.py", "._mail.py"):
        (project / "workflows" / name).write_text("no python\n")
    assert printed(project)["mistakes"] == []


def test_a_module_that_ends_its_process_is_told_and_hides_no_other(project: Path) -> None:
    write(project, "bad", "import sys\nsys.exit('no database')\n")
    assert "SystemExit: no database" in mistake(project)["message"]


@pytest.mark.parametrize(
    "loop",
    ["while True: pass", "import time\ntime.sleep(600)", "while True:\n    try: x = 1\n    except BaseException: pass"],
)
def test_a_module_whose_import_never_ends_is_told_with_the_line_where_it_was_and_hides_no_other(
    project: Path, loop: str
) -> None:
    file = write(project, "bad", f"{loop}\n")
    one = mistake(project, "--import-limit", "300ms")
    assert one["file"] == file
    assert one["line"] > 0
    assert "its import takes more than 0.3 s" in one["message"]


@pytest.mark.parametrize("name", ["other", "flow"])
def test_a_name_that_is_used_twice_is_told_with_both_places(project: Path, name: str) -> None:
    """In two files, and, as a copy is made, in one file by a function of the same name."""
    text = declaring("twice") + f"\n@workflow('twice')\nasync def {name}(step): ...\n"
    file = write(project, "bad", text)
    one = mistake(project)
    assert (one["file"], one["line"]) == (file, 6)
    assert f"'twice' is declared twice: in {file}:3 and in {file}:6" in one["message"]


def test_a_name_that_two_files_use_is_told(project: Path) -> None:
    file = write(project, "reports", declaring("report"))
    one = mistake(project)
    assert (one["file"], one["line"]) == (file, 3)
    assert "'report' is declared twice" in one["message"]


def test_a_file_that_is_imported_by_another_declares_its_workflows_once(project: Path) -> None:
    write(project, "also", "from workflows import good, zzz\n")
    write(project, "zzz", declaring("last"))
    assert {flow["name"] for flow in printed(project)["workflows"]} == {"fulfill-order", "report", "last"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"schedule": "61 * * * *"}, "schedule '61 * * * *': the minute 61 is not from 0 to 59"),
        ({"schedule": "0 9 * * *", "timezone": "Europe/Berlim"}, "there is no time zone 'Europe/Berlim'"),
    ],
)
def test_a_schedule_that_cannot_be_is_told_with_file_line_and_reason(
    project: Path, settings: dict[str, str], reason: str
) -> None:
    file = write(project, "nightly", declaring("nightly", **settings))
    one = mistake(project)
    assert (one["file"], one["line"]) == (file, 3)
    assert one["message"].startswith("workflow 'nightly': ")
    assert reason in one["message"]


@pytest.mark.parametrize("group", ["Mail", "e mail", "", "-x", "x-", "x" * 64, "müll"])
def test_a_name_that_no_group_can_have_is_told(project: Path, group: str) -> None:
    file = write(project, "bad", declaring("mail", group=group))
    one = mistake(project)
    assert (one["file"], one["line"]) == (file, 3)
    assert (
        f"the group of 'mail' is a-z, 0-9 and '-', a letter first, no '-' last, 63 at most, not {group!r}"
        in (one["message"])
    )


CONFIG = """
name = "shop"
[workflows.email]
[workflows.gpu-1]
[servers.web-1]
host = "web-1"
[servers.web-1.workflows.video]
workers = 2
"""


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ("emial", "unknown group 'emial' (Did you mean 'email'? If it is another one, add [workflows.emial].)"),
        ("e-mail", "Did you mean 'email'?"),
        ("emails", "Did you mean 'email'?"),
        ("defualt", "Did you mean 'default'?"),
        ("vidoe", "Did you mean 'video'?"),
        ("workers", "group 'workers' has the name of a setting of [workflows]"),
    ],
)
def test_a_group_that_is_a_slip_away_from_a_configured_one_is_told(project: Path, group: str, reason: str) -> None:
    (project / "tako.toml").write_text(CONFIG)
    file = write(project, "bad", declaring("mail", group=group))
    one = mistake(project)
    assert (one["file"], one["line"]) == (file, 3)
    assert reason in one["message"]


@pytest.mark.parametrize("group", ["email", "video", "default", "reports", "gpu-2", "email-bulk", "sms", "mailing"])
def test_a_configured_group_and_a_plain_new_one_are_fine(project: Path, group: str) -> None:
    (project / "tako.toml").write_text(CONFIG)
    write(project, "fine", declaring("mail", group=group))
    assert group in {flow["group"] for flow in printed(project)["workflows"]}


def test_a_near_name_is_fine_once_the_file_has_it_too(project: Path) -> None:
    (project / "tako.toml").write_text(f"{CONFIG}[workflows.emails]\n")
    write(project, "fine", declaring("mail", group="emails"))
    assert printed(project)["mistakes"] == []


@pytest.mark.slow
def test_one_bad_file_of_each_kind_hides_neither_the_others_nor_the_good_ones(project: Path) -> None:
    (project / "tako.toml").write_text(CONFIG)
    write(project, "a", "import a_module_that_is_not_there\n")
    write(project, "b", "def f(:\n")
    write(project, "c", "while True: pass\n")
    write(project, "d", declaring("nightly", schedule="never"))
    write(project, "e", declaring("mail", group="emial"))
    write(project, "f", declaring("zoned", schedule="0 9 * * *", timezone="Nowhere"))
    write(project, "zz", declaring("fulfill-order"))
    found = printed(project, "--import-limit", "300ms", code=1)
    assert sorted(Path(one["file"]).name for one in found["mistakes"]) == [
        "a.py", "b.py", "c.py", "d.py", "e.py", "f.py", "zz.py",
    ]  # fmt: skip
    assert {"fulfill-order", "report", "nightly"} <= {flow["name"] for flow in found["workflows"]}


def test_reading_it_takes_no_module_of_the_project_into_ones_own_process(project: Path) -> None:
    before = set(registry)
    found = read(project, "workflows", {})
    assert [flow.name for flow in found.workflows] == ["fulfill-order", "report"]
    assert found.groups == {"orders": ("fulfill-order",), "default": ("report",)}
    assert set(registry) == before
    assert "workflows.good" not in sys.modules
    assert IMPORT_LIMIT > 0
    assert Manifest(()).groups == {}


@pytest.mark.parametrize(("end", "how"), [("os._exit(1)", "exit code 1"), ("os.abort()", "killed by SIGABRT")])
def test_files_that_end_the_process_are_named_with_its_last_words_and_hide_no_others(
    end: str, how: str, project: Path
) -> None:
    ends = f"import os\nprint('on stdout', flush=True)\nos.write(2, b'last words')\n{end}\n"
    bad = [write(project, name, ends) for name in ("bad", "worse")]
    write(project, "z", declaring("after"))
    found = read(project, "workflows", {})
    assert [flow.name for flow in found.workflows] == ["after", "fulfill-order", "report"]
    assert [one.file for one in found.mistakes] == bad
    assert all(one.message.startswith("cannot be imported: it ends the process that does (") for one in found.mistakes)
    assert all(one.message.endswith("last words") for one in found.mistakes)
    assert all(how in one.message and "on stdout" in one.traceback for one in found.mistakes)


def test_what_is_wrong_beside_the_files_is_no_files_fault(project: Path) -> None:
    (project / "tako.toml").write_text("name = 3\n")
    with pytest.raises(ConfigError, match="name"):
        read(project, "workflows", {})


def test_without_the_folder_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder 'workflows'"):
        read(tmp_path, "workflows", {})


def test_a_folder_that_cannot_be_read_is_named_and_is_not_an_empty_one(home: Home) -> None:
    home.data_dir.chmod(0o755)
    inner = home.data_dir / "workflows" / "inner"
    inner.mkdir(parents=True)
    write(home.data_dir, "good", declaring("good"))
    inner.chmod(0o000)
    with unprivileged():
        [one] = discover(home.data_dir, "workflows", without=[str(home.data_dir / "workflows" / "good.py")])
    assert (one.file, one.message) == (str(inner), "cannot be read: Permission denied")
    inner.parent.chmod(0o000)
    with (
        unprivileged(),
        pytest.raises(ConfigError, match=f"{inner.parent} cannot be read: Permission denied") as caught,
    ):
        list(discover(home.data_dir, "workflows"))
    assert "mode" in caught.value.hint
    inner.parent.chmod(0o755)
    inner.chmod(0o755)
