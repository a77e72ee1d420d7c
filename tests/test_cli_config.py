"""`tako config`: what holds, and where it comes from."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cli import at_terminal, document, done, environment, make_project, plain, tako

from tako_runtime import config
from tako_runtime.store import Home

EXAMPLE = Path(config.__file__).with_name("example.toml").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", config=EXAMPLE)


def test_example_prints_the_annotated_file_which_is_a_tako_toml(tmp_path: Path) -> None:
    printed = done("config", "example", cwd=tmp_path)
    assert printed == EXAMPLE
    assert document("config", "example", cwd=tmp_path) == {"example": EXAMPLE}
    (tmp_path / "tako.toml").write_text(printed)
    rows = document("config", "show", cwd=tmp_path)["config"]
    assert len(rows) > 25
    assert {row["key"]: row["value"] for row in rows}["name"] == tomllib.loads(printed)["name"]


def test_show_has_each_value_that_holds_and_where_it_comes_from(project: Path) -> None:
    def shown(*words: str) -> dict[str, tuple[object, str]]:
        rows = document("config", "show", *words, cwd=project)["config"]
        return {row["key"]: (row["value"], row["source"]) for row in rows}

    everywhere, there = shown(), shown("--env", "production", "--server", "web-1")
    assert everywhere["workflows.email.workers"] == (1, "tako.toml:23 [workflows.email]")
    assert there["workflows.email.workers"] == (4, "tako.toml:45 [servers.web-1.workflows.email]")
    assert (everywhere["vars.LOG_LEVEL"][0], there["vars.LOG_LEVEL"][0]) == ("info", "warning")
    (project / "tako.toml").write_text('name = "shop"\n')
    assert shown()["workflows.default.grace"] == ("30s", "built-in")
    assert shown()["metrics.listen"] == (None, "built-in")


@pytest.mark.parametrize("columns", [80, 60])
def test_show_for_people_fits_the_terminal_and_leaves_nothing_out(columns: int, project: Path) -> None:
    words = ("config", "show", "--env", "production", "--server", "web-1")
    code, shown = at_terminal(*words, cwd=project, columns=columns, NO_COLOR="1")
    assert code == 0
    shown = plain(shown)
    assert max(map(len, shown.splitlines())) <= columns
    for row in document(*words, cwd=project)["config"]:
        assert row["source"].split()[0] in shown
        assert row["key"].rpartition(".")[2] in shown
    assert '["uvicorn", "app:app", "--fd", "{fd}"]' in shown
    assert "[servers.web-1.workflows.email]" in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--env", "prodution"], 'there is no environment "prodution"', "Did you mean production?"),
        (["--server", "web-2"], 'there is no server "web-2"', "Did you mean servers.web-1?"),
    ],
)
def test_a_name_that_the_file_does_not_have_is_told_with_the_nearest(
    project: Path, words: list[str], message: str, hint: str
) -> None:
    answer = document("config", "show", *words, cwd=project, code=3)
    assert answer["error"]["message"].endswith(message)
    assert answer["error"]["hint"] == hint


def test_show_of_a_wrong_file_tells_every_mistake(project: Path) -> None:
    (project / "tako.toml").write_text('name = "shop"\n[workflows]\nworkers = "2"\nconcurency = 3\n')
    told = tako("config", "show", cwd=project)
    assert told.returncode == 3
    assert "tako.toml:3: workflows.workers: must be a whole number from 0 to 1000" in told.stderr
    assert "tako.toml:4: workflows.concurency: unknown key" in told.stderr
    assert "Did you mean workflows.concurrency?" in told.stderr


def test_with_a_wrong_file_nothing_starts(project: Path, home: Home) -> None:
    (project / "tako.toml").write_text('name = "shop"\n[workflows]\nworkers = 2\ngrace = "1 year"\n')
    says = "tako.toml:4: workflows.grace: must be a duration from 0s to 1h"
    assert says in document("dev", cwd=project, code=3)["error"]["message"]
    assert not (project / ".tako").exists()
    served = subprocess.run(
        [sys.executable, "-m", "tako_runtime", "serve"], cwd=project, env=environment(**home.environment()),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert served.returncode != 0
    assert says in served.stderr
    assert not home.app_dir.exists()
