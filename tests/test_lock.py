"""A project's dependencies, locked with hashes for a server, by uv and by pip; and the wheels that are made here."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path

import pytest
from packing import NEWER, OF_THE_RUNTIME, SERVER, index, make_wheel, pack, read, shop, tool, unpacked

from tako_cli.deploy import lock, wheels
from tako_cli.deploy.lock import Target
from tako_runtime.errors import ConfigError, NotFound, TakoError

# They run processes of their own.
pytestmark = pytest.mark.slow

__all__ = ["index", "shop", "tool"]  # fixtures

ROOT = Path(__file__).parent.parent

_SHOW = "import widgets, paint, importlib.util as u; print(widgets.VERSION, u.find_spec('tako_runtime').origin)"

OURS = {"apsw", "croniter", "msgspec", "tzdata"}


def locked(shop: Path, target: Target = SERVER, *, anew: bool = False) -> dict[str, str]:
    """What a server of that kind would install: name and version."""
    text = lock_of(shop, target, anew=anew)
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))


def lock_of(shop: Path, target: Target = SERVER, *, anew: bool = False) -> str:
    made = pack(shop, target, anew=anew)
    return read(made, made.requirements[target])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("tool")
class TestLocked:
    def test_a_project_that_needs_nothing_gets_what_the_runtime_needs(self, shop: Path, index: Path) -> None:
        text = lock_of(shop)
        assert locked(shop) == OF_THE_RUNTIME
        runtime = wheels.runtime()
        assert f"./wheels/{runtime.name} --hash=sha256:{runtime.sha256}\n" in text
        assert all("--hash=sha256:" in line for line in text.splitlines() if not line.startswith("#"))
        assert sha256(next(index.glob("tzdata-*"))) in text

    @pytest.mark.parametrize("stated", ["pyproject", "requirements"])
    def test_what_the_project_says_is_locked_with_all_that_it_needs(self, shop: Path, index: Path, stated: str) -> None:
        make_wheel(index, "widgets", "1.2", needs=["paint>=2"])
        make_wheel(index, "widgets", "2.0", needs=["paint>=2"])
        paint = make_wheel(index, "paint", "2.1")
        if stated == "pyproject":
            (shop / "pyproject.toml").write_text('[project]\nname = "shop"\ndependencies = ["Widgets<2", "tako"]\n')
        else:
            (shop / "requirements.txt").write_text("# ours\nWidgets \\\n  < 2  # not yet\n\ntako>=0.1\n")
        assert locked(shop) == {**OF_THE_RUNTIME, "widgets": "1.2", "paint": "2.1"}
        assert f"paint==2.1 --hash=sha256:{sha256(paint)}" in lock_of(shop)

    def test_requirements_win_over_pyproject_and_files_that_they_name_count(self, shop: Path, index: Path) -> None:
        for version in ("1", "2", "3"):
            make_wheel(index, "widgets", version)
        make_wheel(index, "paint", "1")
        (shop / "pyproject.toml").write_text('[project]\nname = "shop"\ndependencies = ["nothing-like-it"]\n')
        (shop / "requirements.txt").write_text("-r more/base.txt\n-c more/limits.txt\n")
        (shop / "more").mkdir()
        (shop / "more" / "base.txt").write_text("--requirement=other.txt\nwidgets\n")
        (shop / "more" / "other.txt").write_text("paint\n")
        (shop / "more" / "limits.txt").write_text("widgets<3\n")
        assert locked(shop) == {**OF_THE_RUNTIME, "widgets": "2", "paint": "1"}
        (shop / "requirements.txt").write_text("-r none.txt\n")
        with pytest.raises(ConfigError, match=r"requirements\.txt: -r none\.txt: No such file"):
            pack(shop)

    def test_the_files_are_those_for_the_servers_python_and_platform(self, shop: Path, index: Path) -> None:
        made = pack(shop, SERVER, NEWER)
        for target in (SERVER, NEWER):
            [wheel] = index.glob(f"apsw-*cp{target.python.replace('.', '')}-*_{target.machine}.whl")
            assert sha256(wheel) in read(made, made.requirements[target])

    def test_hashes_that_the_project_has_are_the_only_ones_that_count(self, shop: Path, index: Path) -> None:
        widgets = make_wheel(index, "widgets", "1")
        (shop / "requirements.txt").write_text(
            f"widgets==1 \\\n    --hash=sha256:{sha256(widgets)} --hash=sha256:{'0' * 64}\n"
        )
        assert f"widgets==1 --hash=sha256:{sha256(widgets)}\n" in lock_of(shop)
        (shop / "requirements.txt").write_text(f"widgets==1 --hash=sha256:{'0' * 64}\n")
        with pytest.raises(TakoError, match=r"of widgets are not those whose hashes requirements\.txt has"):
            pack(shop)

    def test_the_same_requirements_keep_their_versions_until_new_ones_are_asked_for(
        self, shop: Path, index: Path
    ) -> None:
        make_wheel(index, "widgets", "1")
        (shop / "requirements.txt").write_text("widgets\n")
        first = pack(shop)
        make_wheel(index, "widgets", "2")
        assert locked(shop)["widgets"] == "1"
        assert pack(shop).digest == first.digest
        assert locked(shop, anew=True)["widgets"] == "2"
        newer = pack(shop)
        assert (newer.id, newer.digest != first.digest, newer.other_id != first.other_id) == (first.id, True, True)
        (shop / "requirements.txt").write_text("widgets<2\n")
        assert locked(shop)["widgets"] == "1"

    def test_what_cannot_be_found_is_said_in_the_tools_words_and_nothing_is_written(self, shop: Path) -> None:
        (shop / "requirements.txt").write_text("no-such-package>=1\n")
        with pytest.raises(TakoError, match=r"(?s)the dependencies cannot be locked:.*no-such-package"):
            pack(shop)
        assert not list((shop / ".tako").rglob("*.tar.gz"))

    def test_takos_own_name_is_never_looked_up_on_an_index(self, shop: Path, index: Path) -> None:
        make_wheel(index, "tako", "99.0")
        make_wheel(index, "plugin", "1", needs=["tako"])
        (shop / "requirements.txt").write_text("tako\nplugin\ntako @ file:///home/ada/tako\n")
        text = lock_of(shop)
        assert re.findall(r"^(?:\./wheels/)?tako.*", text, re.MULTILINE) == [
            f"./wheels/{wheels.runtime().name} --hash=sha256:{wheels.runtime().sha256}"
        ]
        assert "plugin==1" in text
        (shop / "requirements.txt").write_text("tako>=50\n")
        with pytest.raises(TakoError, match="cannot be locked"):
            pack(shop)

    def test_with_vendor_every_wheel_comes_along_and_it_installs_with_no_index_at_all(
        self, shop: Path, index: Path, tmp_path: Path
    ) -> None:
        make_wheel(index, "widgets", "1", needs=["paint"])
        make_wheel(index, "paint", "1")
        (shop / "requirements.txt").write_text("widgets\n")
        (shop / "tako.toml").write_text('name = "shop"\n[deploy]\nvendor = true\n')
        here = Target(f"{sys.version_info[0]}.{sys.version_info[1]}", SERVER.machine, SERVER.glibc)
        make_wheel(index, "apsw", "3.99.0", "py3-none-any")  # whatever Python this is
        made = pack(shop, here)
        assert made.vendored
        assert pack(shop, here).digest == made.digest
        place = unpacked(made, tmp_path / "releases")
        for wheel in index.iterdir():
            wheel.unlink()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=place, check=True)
        words = [sys.executable, str(place / made.pip / "pip"), "--python", "../.venv", "install", "--quiet"]
        words += ["--require-hashes", "-r", Path(made.requirements[here]).name]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env |= {"PIP_CONFIG_FILE": os.devnull}
        done = subprocess.run(words, cwd=place / ".release", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        words = [str(place / ".venv/bin/python"), "-I", "-c", _SHOW]
        shown = subprocess.run(words, capture_output=True, text=True, check=False)
        assert shown.stdout.startswith(f"1 {place}/.venv/"), shown.stderr

    def test_with_vendor_a_package_that_has_no_wheel_for_the_server_stops_it_here(
        self, shop: Path, index: Path
    ) -> None:
        make_wheel(index, "widgets", "1", "cp311-cp311-manylinux_2_39_x86_64")
        (shop / "requirements.txt").write_text("widgets\n")
        (shop / "tako.toml").write_text('name = "shop"\n[deploy]\nvendor = true\n')
        with pytest.raises(TakoError, match=r"(?s)cannot be locked:.*widgets") as caught:
            pack(shop, SERVER)
        assert "Python 3.11, x86_64, glibc 2.36" in caught.value.hint
        assert locked(shop, Target("3.11", "x86_64", "2.39"))["widgets"] == "1"


@pytest.mark.parametrize(
    "line",
    ["git+https://example.com/widgets.git", "widgets @ git+ssh://git@example.com/widgets", "-e .", "-e ./libs/widgets",
     "./libs/widgets", "../widgets", "/home/ada/widgets.whl", "widgets @ file:///home/ada/widgets", "libs/widgets"],
)  # fmt: skip
def test_what_no_hash_can_be_given_for_is_refused_by_its_line(shop: Path, index: Path, line: str) -> None:
    (shop / "requirements.txt").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"requirements\.txt: no hash can be given for") as caught:
        pack(shop)
    assert line in str(caught.value)


def test_a_wheel_by_its_https_address_and_options_and_markers_are_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(
        "--index-url=https://ada:pass@index.example.com/simple\n-f wheels\n--require-hashes\n"
        "widgets @ https://example.com/widgets-1-py3-none-any.whl\npaint@https://example.com/p.whl\n"
        "Brush[soft,hard]>=1 ; python_version < '3.13'\ntako[postgres]>=0.1\n"
    )
    found = lock.needs(tmp_path)
    assert found.options == ["--index-url https://ada:pass@index.example.com/simple", "--find-links wheels"]
    assert [line.partition("@")[0].strip() for line in found.lines[:2]] == ["widgets", "paint"]
    assert found.extras == {"postgres"}


@pytest.mark.parametrize(
    "told", ['[project]\nname = "x"\ndynamic = ["dependencies"]\n', "[tool.poetry.dependencies]\nrich = '*'\n"]
)
def test_a_pyproject_whose_dependencies_only_its_tool_knows_is_refused(tmp_path: Path, told: str) -> None:
    (tmp_path / "pyproject.toml").write_text(told)
    with pytest.raises(ConfigError, match="only the project's own build tool") as caught:
        lock.needs(tmp_path)
    assert "requirements.txt" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [
        ("requirements.txt", b"caf\xe9\n", r"requirements\.txt: it is not text in UTF-8"),
        ("pyproject.toml", b"[project\n", "not valid TOML"),
        ("pyproject.toml", b'[project]\ndependencies = "rich"\n', "not a list of texts"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, file: str, data: bytes, says: str) -> None:
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        lock.needs(tmp_path)


def test_a_machine_that_uv_has_no_platform_for_is_locked_by_pip(shop: Path, index: Path) -> None:
    make_wheel(index, "apsw", "3.99.0", "py3-none-any")
    assert locked(shop, Target("3.11", "riscv64", "2.41")) == OF_THE_RUNTIME


@pytest.mark.usefixtures("tool", "index")
def test_a_password_of_an_index_is_in_no_error(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "requirements.txt").write_text("--index-url http://ada:hunter22@127.0.0.1:9/simple\nno-such-package\n")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("UV_OFFLINE")
    for name in ("PIP_RETRIES", "UV_HTTP_RETRIES"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(TakoError, match="cannot be locked") as caught:
        pack(shop)
    assert "hunter22" not in str(caught.value)


def test_deploys_that_get_the_same_wheels_at_once_have_them_both(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pip, both = make_wheel(index, "widgets", "1"), lock._pip, threading.Barrier(2)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    needed = lock.Locked({"widgets==1": [f"sha256:{digest}"]}, [])

    def together(words: list[str], what: str) -> None:
        pip(words, what)
        both.wait(60)

    monkeypatch.setattr(lock, "_pip", together)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(lock.wheelhouse, needed, [], SERVER, tmp_path / "kept") for _ in range(2)]
        found = [each.result() for each in asked]
    assert [list(each) for each in found] == [[made.name]] * 2
    assert all(path.read_bytes() == made.read_bytes() for each in found for path in each.values())


def test_a_uv_lock_is_what_counts_and_without_uv_it_is_refused(
    shop: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = lock.find_uv()
    if uv is None:
        pytest.skip("there is no uv here")
    make_wheel(index, "widgets", "1")
    (shop / "pyproject.toml").write_text(
        '[project]\nname = "shop"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["widgets"]\n'
    )
    subprocess.run([uv, "lock", "--quiet"], cwd=shop, check=True, timeout=60)
    make_wheel(index, "widgets", "2")
    assert locked(shop)["widgets"] == "1"
    (shop / "pyproject.toml").write_text(
        '[project]\nname = "shop"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["widgets>1"]\n'
    )
    with pytest.raises(TakoError, match=r"uv\.lock cannot be used"):
        pack(shop)
    monkeypatch.setattr(lock, "find_uv", lambda: None)
    with pytest.raises(NotFound, match=r"has a uv\.lock, and there is no uv here"):
        pack(shop)


# --- the wheels that are made here -----------------------------------------------------------------------------------

MAKE = "import sys; from tako_cli.deploy import wheels; sys.stdout.buffer.write(wheels.runtime().data)"


def test_the_runtimes_wheel_is_the_same_from_a_checkout_and_from_an_installed_wheel(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, capture_output=True, check=True, timeout=60)
    [wheel] = tmp_path.glob("tako-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    installed = subprocess.run([sys.executable, "-c", MAKE], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert hashlib.sha256(installed.stdout).hexdigest() == wheels.runtime().sha256


def test_it_has_the_runtime_with_its_data_and_neither_the_command_nor_what_only_that_needs(tmp_path: Path) -> None:
    made = wheels.runtime()
    (tmp_path / made.name).write_bytes(made.data)
    with zipfile.ZipFile(tmp_path / made.name) as packed:
        inside = packed.namelist()
        told = packed.read(next(name for name in inside if name.endswith("METADATA"))).decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tako_runtime").rglob("*") if path.is_file()}
    sources = {path for path in sources if "__pycache__" not in path}
    assert {name for name in inside if ".dist-info/" not in name} == sources
    assert "tako_runtime/example.toml" in sources
    needed = {wheels.project_name(line) for line in re.findall(r"^Requires-Dist: (.*)", told, re.MULTILINE)}
    assert needed >= OURS
    assert not needed & wheels.OF_THE_COMMAND
    assert "Name: tako\n" in told


def test_all_that_the_runtime_imports_is_named_in_its_wheel() -> None:
    stated = [need.removeprefix("Requires-Dist: ") for need in wheels.runtime().needs]
    needed = {wheels.project_name(need).replace("-", "_") for need in stated}
    optional = {"pydantic", "attr", "attrs", "psycopg"}  # used where the project has them
    found = set()
    for path in (ROOT / "tako_runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    found |= {one.name.partition(".")[0] for one in names}
                case ast.ImportFrom(module=str(module)):
                    found.add(module.partition(".")[0])
    assert {"apsw", "msgspec", "croniter"} <= found
    assert found - set(sys.stdlib_module_names) - {"tako_runtime"} - optional <= needed


def test_pip_runs_from_the_wheel_that_comes_along(tmp_path: Path) -> None:
    made = wheels.pip()
    (tmp_path / made.name).write_bytes(made.data)
    words = [sys.executable, "-I", f"{tmp_path / made.name}/pip", "--version"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown.startswith(f"pip {made.name.split('-')[1]} from {tmp_path}")


@pytest.mark.parametrize("source", ["ensurepip", "uv"])
def test_without_a_pip_of_its_own_the_one_of_ensurepip_or_uv_comes_along(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    installed = wheels.pip()
    (index / installed.name).write_bytes(installed.data)
    find_spec = util.find_spec

    def none(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(wheels.metadata, "distribution", none)
    if source == "uv":
        monkeypatch.setattr(wheels.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name))
        if wheels.find_uv() is None:
            pytest.skip("there is no uv here")
    made = wheels.pip.__wrapped__()
    (tmp_path / made.name).write_bytes(made.data)
    words = [sys.executable, "-I", f"{tmp_path / made.name}/pip", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.startswith("pip ")
    monkeypatch.setattr(wheels, "find_uv", lambda: None)
    monkeypatch.setattr(wheels.util, "find_spec", lambda name: None)
    with pytest.raises(TakoError, match="neither pip nor uv"):
        wheels.pip.__wrapped__()


def test_what_is_kept_of_a_lock_is_json_with_nothing_of_this_machine(shop: Path, index: Path) -> None:
    pack(shop)
    [kept] = (shop / ".tako" / "deploy" / "locks").glob("*.json")
    assert set(json.loads(kept.read_text())) == {f"{name}=={version}" for name, version in OF_THE_RUNTIME.items()}
    assert str(index) not in kept.read_text()
