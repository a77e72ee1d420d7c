"""What an installation gets: the wheel, and what the code in it stands on."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, in a folder of its own, as pip would lay it out."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(words, cwd=ROOT, capture_output=True, check=True, timeout=60)
    [wheel] = folder.glob("tako-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def from_wheel(installed: Path, cwd: Path, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, *words], cwd=cwd, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_wheel_carries_the_templates_and_completions_and_its_command_finds_them(
    installed: Path, tmp_path: Path
) -> None:
    where = from_wheel(
        installed, tmp_path, "-c", "import tako_cli, tako_runtime as r; print(tako_cli.__file__, r.__file__)"
    )
    assert all(Path(file).is_relative_to(installed) for file in where.split())
    from_wheel(installed, tmp_path, "-m", "tako_cli", "init", "shop", "--yes")
    made = {path.relative_to(tmp_path / "shop") for path in (tmp_path / "shop").rglob("*") if path.is_file()}
    template = ROOT / "templates" / "shop" / "{{cookiecutter.name}}"
    assert made == {path.relative_to(template) for path in template.rglob("*") if path.is_file()}
    carried = installed / "tako_cli" / "data" / "completions"
    for file in (ROOT / "completions").iterdir():
        assert (carried / file.name).read_text() == file.read_text()


def test_what_is_installed_migrates_a_store_and_shows_the_example(installed: Path, tmp_path: Path) -> None:
    """Its SQL and its annotated example are data, which a wheel may forget."""
    from_wheel(installed, tmp_path, "-m", "tako_cli", "init", "shop", "--yes")
    shop = tmp_path / "shop"
    from_wheel(installed, shop, "-m", "tako_cli", "runs", "start", "fulfill-order", "--payload", "@order.json")
    assert from_wheel(installed, shop, "-m", "tako_cli", "config", "example").startswith("#")


def test_the_runtime_stands_on_neither_the_command_nor_what_only_the_command_needs(tmp_path: Path) -> None:
    code = """
        import importlib, pkgutil, sys, tako_runtime
        for module in pkgutil.walk_packages(tako_runtime.__path__, "tako_runtime."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
    """
    words = [sys.executable, "-c", re.sub(r"^ {8}", "", code, flags=re.MULTILINE)]
    loaded = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert "tako_runtime" in loaded
    assert not {"tako_cli", "typer", "rich", "cookiecutter", "tomli_w"} & set(loaded)


def test_a_worker_starts_without_what_reads_tako_toml(tmp_path: Path) -> None:
    code = "import sys; from tako_runtime import __main__; print(*sys.modules)"
    words = [sys.executable, "-c", code]
    loaded = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert "tako_runtime.worker" in loaded
    assert not {"tako_runtime.config", "tomllib", "croniter"} & set(loaded)


def test_only_the_store_speaks_to_sqlite() -> None:
    speaks = re.compile(r"^\s*(import|from) (apsw|sqlite3)\b", re.MULTILINE)
    found = [path for path in (ROOT / "tako_runtime").rglob("*.py") if speaks.search(path.read_text())]
    assert {path.parent.name for path in found} == {"store"}
