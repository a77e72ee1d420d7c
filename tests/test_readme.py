"""The README and the pages behind it say what is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {path.name: path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}


def test_the_command_reference_is_what_the_commands_say_of_themselves() -> None:
    words = [sys.executable, "-m", "tako_cli.reference"]
    env = {**os.environ, "COLUMNS": "200"}  # whoever makes it, at whatever width
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=env, timeout=60).stdout
    assert made.strip() in PAGES["commands.md"], "python -m tako_cli.reference --write docs/commands.md"


def test_it_shows_the_annotated_example_of_tako_toml_as_it_is() -> None:
    [shown] = re.findall(
        r"<!-- example: tako_runtime/example.toml -->\n\n```toml\n(.*?)```", PAGES["configuration.md"], re.DOTALL
    )
    assert shown == (ROOT / "tako_runtime" / "example.toml").read_text("utf-8")


def test_its_first_page_says_at_least_once_and_what_the_key_of_a_step_is_for() -> None:
    first_page = README.split("\n## ")[0]
    [said] = re.findall(r"### At least once.*?\n\n(.*)", first_page, re.DOTALL)
    assert "runs once more" in said
    assert "`step.key(" in said


def test_every_link_within_the_documentation_leads_somewhere() -> None:
    pages = {ROOT / "README.md": README, **{ROOT / "docs" / name: text for name, text in PAGES.items()}}
    anchors = {
        path: {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for path, text in pages.items()
    }
    links = [(path, link) for path, text in pages.items() for link in re.findall(r"\]\((?!https?:)([\w./#-]+)\)", text)]
    assert len(links) >= 10
    for path, link in links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_file(), (path.name, link)
        assert not anchor or anchor in anchors[target], (path.name, link)


def test_every_page_is_reached_from_the_readme() -> None:
    assert {name for name in PAGES if f"(docs/{name})" not in README} == set()


def test_every_error_of_the_public_names_is_documented_in_the_tree_of_errors() -> None:
    from tako_runtime import errors

    tree = errors.__doc__ or ""
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.TakoError):
            assert re.search(rf"\b{name}\b", tree), name


@pytest.mark.parametrize("name", re.findall(r"`(\w+\.py)`", PAGES["how-it-is-built.md"]))
def test_a_module_that_the_pages_name_is_there(name: str) -> None:
    assert list((ROOT / "tako_runtime").rglob(name))
