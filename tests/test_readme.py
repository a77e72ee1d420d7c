"""The README says what is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_command_reference_is_what_the_commands_say_of_themselves() -> None:
    words = [sys.executable, "-m", "tako_cli.reference"]
    env = {**os.environ, "COLUMNS": "200"}  # whoever makes it, at whatever width
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=env, timeout=60).stdout
    assert made.strip() in README, "python -m tako_cli.reference --write README.md"


def test_it_shows_the_annotated_example_of_tako_toml_as_it_is() -> None:
    [shown] = re.findall(r"<!-- example: tako_runtime/example.toml -->\n\n```toml\n(.*?)```", README, re.DOTALL)
    assert shown == (ROOT / "tako_runtime" / "example.toml").read_text("utf-8")


def test_its_first_page_says_at_least_once_and_what_the_key_of_a_step_is_for() -> None:
    first_page = README.split("\n## ")[0]
    [said] = re.findall(r"### At least once.*?\n\n(.*)", first_page, re.DOTALL)
    assert "runs once more" in said
    assert "`step.key(" in said


def test_every_error_of_the_public_names_is_documented_in_the_tree_of_errors() -> None:
    from tako_runtime import errors

    tree = errors.__doc__ or ""
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.TakoError):
            assert re.search(rf"\b{name}\b", tree), name


@pytest.mark.parametrize("name", re.findall(r"`(\w+\.py)`", README.split("## How it is built")[1]))
def test_a_module_that_the_readme_names_is_there(name: str) -> None:
    assert list((ROOT / "tako_runtime").rglob(name))
