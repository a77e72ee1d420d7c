"""The shells' completions: the files are what the command prints, and they complete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import document, done, environment, tako

FOLDER = Path(__file__).parent.parent / "completions"


@pytest.mark.parametrize(("shell", "file"), [("bash", "tako.bash"), ("zsh", "_tako"), ("fish", "tako.fish")])
def test_the_files_are_what_the_command_prints(shell: str, file: str, tmp_path: Path) -> None:
    assert done("completions", shell, cwd=tmp_path) == (FOLDER / file).read_text()
    assert document("completions", shell, cwd=tmp_path)["completions"]["shell"] == shell


def test_a_shell_without_completions_is_wrong_usage(tmp_path: Path) -> None:
    ended = tako("completions", "tcsh", cwd=tmp_path)
    assert ended.returncode == 2
    assert "bash" in ended.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("ru", {"run", "runs"}), ("runs s", {"show", "start", "signal"}), ("runs ls --st", {"--status"})],
)
def test_bash_completes_commands_and_options(typed: str, offered: set[str], tmp_path: Path) -> None:
    words = ["tako", *typed.split()]
    ask = (
        f"source {FOLDER / 'tako.bash'}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1};"
        ' _tako_completion tako; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    answer = subprocess.run(
        ["bash", "--norc", "-c", ask], cwd=tmp_path, env=environment(PATH=beside_python), capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    assert set(answer.stdout.split()) == offered


def test_zsh_and_fish_are_told_the_same_with_a_line_on_each(tmp_path: Path) -> None:
    fish = tako(
        cwd=tmp_path, _TAKO_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args",
        _TYPER_COMPLETE_ARGS="tako runs ca",
    )  # fmt: skip
    assert fish.stdout == "cancel\tCancel runs.\n"
    zsh = tako(cwd=tmp_path, _TAKO_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="tako runs ca")
    assert '"cancel":"Cancel runs."' in zsh.stdout
