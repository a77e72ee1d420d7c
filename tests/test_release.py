"""What `tako deploy` packs: the same tree gives the same release, and what could not be one fails before it is sent."""

import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cli import make_project
from packing import FLOWS, NEWER, SERVER, commit, git, index, load, names, pack, read, shop, unpacked

from tako_cli.deploy import release, tree
from tako_runtime.errors import ConfigError, Refused, TakoError

__all__ = ["index", "shop"]  # fixtures

# They run processes of their own.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("index")]

SAFE = r"[a-z0-9][a-z0-9-]{1,62}"


# --- which files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_git", [True, False])
def test_tracked_and_unignored_files_are_sent_and_never_what_no_server_should_have(shop: Path, with_git: bool) -> None:
    (shop / ".gitignore").write_text("*.log\n/build/\ndata/*\n!data/keep.csv\n")
    for path in (
        "app.py",
        "a.log",
        "build/x",
        "sub/build/y",
        "data/big.csv",
        "data/keep.csv",
        "sub/.gitignore",
        "sub/z.txt",
    ):
        (shop / path).parent.mkdir(parents=True, exist_ok=True)
        (shop / path).write_text("*.txt\n!a.log\n" if path.endswith(".gitignore") else path)
    for path in (
        ".env", ".env.production", "sub/.envrc", ".tako/apps/shop/runs.db", ".tako/secrets/production.age",
        "workflows/__pycache__/flows.cpython-311.pyc", ".pytest_cache/x", ".mypy_cache/x", ".ruff_cache/x",
        ".venv/pyvenv.cfg", ".venv/lib/x.py", "env3/pyvenv.cfg", "env3/lib/x.py", "sub/old.pyc",
    ):  # fmt: skip
        (shop / path).parent.mkdir(parents=True, exist_ok=True)
        (shop / path).write_text(path)
    if with_git:
        git(shop, "init", "-q", ".")
    assert names(pack(shop)) == {
        ".gitignore", "app.py", "data/keep.csv", "sub/.gitignore", "sub/build/y", "tako.toml", "workflows/flows.py",
    }  # fmt: skip


def test_wheels_of_dependencies_that_are_long_gone_do_not_stay(shop: Path) -> None:
    kept = shop / ".tako" / "deploy" / "wheels"
    (shop / "tako.toml").write_text('name = "shop"\n[deploy]\nvendor = true\n')
    pack(shop)
    [first] = kept.iterdir()
    for age in range(1, 8):
        (kept / f"old-{age}").mkdir()
        os.utime(kept / f"old-{age}", (first.stat().st_mtime - age * 14 * 3600,) * 2)
    os.utime(first, (0, 0))  # it was used long ago, and is again
    pack(shop)
    assert {place.name for place in kept.iterdir()} == {first.name, "old-1", "old-2", "old-3", "old-4"}
    for age in range(1, 8):
        (kept / f"new-{age}").mkdir(exist_ok=True)
    pack(shop)
    assert {f"new-{age}" for age in range(1, 8)} < {place.name for place in kept.iterdir()}, "somebody works with them"


def test_an_app_that_binds_its_port_itself_is_told_of_the_gap_at_the_switch(shop: Path) -> None:
    app = 'name = "shop"\n[app]\nport = 8000\ncommand = ["uvicorn", "app:app", '
    (shop / "tako.toml").write_text(app + '"--port", "{port}"]\n')
    [note] = pack(shop).notes
    assert "nobody is answered" in note
    assert "{fd}" in note
    (shop / "tako.toml").write_text(app + '"--fd", "{fd}"]\n')
    assert pack(shop).notes == ()


def test_a_tracked_file_is_sent_though_it_is_ignored_and_an_env_file_is_not_though_it_is_tracked(shop: Path) -> None:
    (shop / ".gitignore").write_text("*.csv\n")
    (shop / "prices.csv").write_text("1")
    (shop / ".env").write_text("KEY=1")
    git(shop, "init", "-q", ".")
    git(shop, "add", "-f", "prices.csv", ".env")
    commit(shop)
    made = pack(shop)
    assert names(made) == {".gitignore", "prices.csv", "tako.toml", "workflows/flows.py"}
    assert made.notes == ("never sent, though git tracks it: .env",)
    assert not made.dirty


def test_a_project_in_a_folder_of_a_bigger_repository_is_sent_alone(tmp_path: Path) -> None:
    shop = make_project(tmp_path / "all" / "shop", FLOWS)
    (tmp_path / "all" / "other.py").write_text("")
    (tmp_path / "all" / ".gitignore").write_text("*.log\n")
    (shop / "a.log").write_text("")
    made = commit(tmp_path / "all")
    (tmp_path / "all" / "other.py").write_text("changed")
    packed = pack(shop)
    assert names(packed) == {"tako.toml", "workflows/flows.py"}
    assert packed.id == made[:12]
    (shop / "workflows" / "flows.py").write_text("# changed\n")
    assert pack(shop).dirty


def test_a_project_that_the_repository_around_it_ignores_counts_as_one_without_git(tmp_path: Path) -> None:
    shop = make_project(tmp_path / "home" / "shop", FLOWS)
    (tmp_path / "home" / ".gitignore").write_text("*\n")
    git(tmp_path / "home", "init", "-q", ".")
    assert names(pack(shop)) == {"tako.toml", "workflows/flows.py"}


def test_a_hook_of_git_packs_the_project_and_not_what_the_hook_is_about(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = commit(shop)
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "-q", ".")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / ".git" / "index"))
    assert pack(shop).id == head[:12]


def test_without_the_program_git_the_rules_of_gitignore_hold(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / ".gitignore").write_text("*.log\n")
    (shop / "a.log").write_text("")
    commit(shop)
    monkeypatch.setattr(tree, "_asked", lambda *words: subprocess.run(["git-is-not-here"], check=False))
    made = pack(shop)
    assert names(made) == {".gitignore", "tako.toml", "workflows/flows.py"}
    assert re.fullmatch(r"tree-[0-9a-f]{12}", made.id)


def test_what_git_cannot_do_is_said_in_its_words(shop: Path) -> None:
    commit(shop)
    (shop / ".git" / "index").write_bytes(b"damaged")
    with pytest.raises(TakoError, match=r"git ls-files in .*index"):
        pack(shop)


def test_submodules_are_sent_and_one_that_is_not_checked_out_is_refused(shop: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "prices.py").write_text("PRICE = 1\n")
    (library / ".gitignore").write_text("*.log\n")
    commit(library)
    git(shop, "init", "-q", ".")
    git(shop, "submodule", "--quiet", "add", str(library), "library")
    (shop / "library" / "a.log").write_text("")
    head = commit(shop)
    made = pack(shop)
    assert {"library/prices.py", "library/.gitignore"} <= names(made)
    assert not {"library/a.log", "library/.git"} & names(made)
    assert made.id == head[:12]
    (shop / "library" / "prices.py").write_text("PRICE = 2\n")
    assert pack(shop).dirty
    git(shop, "submodule", "--quiet", "deinit", "-f", "library")
    with pytest.raises(Refused, match="not checked out: library") as caught:
        pack(shop)
    assert "git submodule update --init" in caught.value.hint


def test_a_repository_inside_that_is_no_submodule_is_refused_until_it_is_ignored(shop: Path) -> None:
    (shop / "tools").mkdir()
    (shop / "tools" / "x.py").write_text("")
    commit(shop / "tools")
    git(shop, "init", "-q", ".")
    with pytest.raises(Refused, match=r"a repository of its own is in the project.*tools/"):
        pack(shop)
    (shop / ".gitignore").write_text("tools/\n")
    assert "tools/x.py" not in names(pack(shop))


@pytest.mark.parametrize("with_git", [True, False])
def test_names_with_newlines_and_bytes_that_are_no_text_arrive_as_they_are(
    shop: Path, tmp_path: Path, with_git: bool
) -> None:
    odd = ["a\nb.txt", "caf\udce9.txt", "caf\u00e9.txt", " blank ", "-rf", 'quo"te\\n', "x" * 200, "tab\there"]
    deep = "/".join(["d" * 60] * 5) + "/caf\udce9"
    for name in [*odd, deep]:
        (shop / name).parent.mkdir(parents=True, exist_ok=True)
        (shop / name).write_text("content")
    if with_git:
        commit(shop)
    made = pack(shop)
    assert {*odd, deep} <= names(made)
    place = unpacked(made, tmp_path / "releases")
    for name in [*odd, deep]:
        assert (place / name).read_text() == "content"


def test_links_inside_are_kept_and_modes_are_and_nothing_else_of_this_machine(shop: Path, tmp_path: Path) -> None:
    (shop / "run.sh").write_text("#!/bin/sh\n")
    (shop / "run.sh").chmod(0o777)
    (shop / "secretive").write_text("x")
    (shop / "secretive").chmod(0o600)
    (shop / "sub").mkdir()
    (shop / "sub" / "flows").symlink_to("../workflows")
    (shop / "current").symlink_to("run.sh")
    place = unpacked(pack(shop), tmp_path / "releases")
    assert str((place / "sub" / "flows").readlink()) == "../workflows"
    assert str((place / "current").readlink()) == "run.sh"
    modes = {name: (place / name).lstat().st_mode & 0o7777 for name in ("run.sh", "secretive", "sub")}
    assert modes == {"run.sh": 0o755, "secretive": 0o644, "sub": 0o755}
    with tarfile.open(pack(shop).file) as tar:
        assert {(one.uid, one.gid, one.uname, one.gname) for one in tar} == {(0, 0, "", "")}


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "sub/../../outside", "loop/../../outside"])
@pytest.mark.parametrize("with_git", [True, False])
def test_a_link_that_leaves_the_project_is_refused_by_name(shop: Path, target: str, with_git: bool) -> None:
    (shop.parent / "outside").write_text("x")
    (shop / "loop").symlink_to(".")
    (shop / "leaving").symlink_to(target)
    if with_git:
        commit(shop)
    with pytest.raises(Refused, match=re.escape(f"leaving -> {target}")) as caught:
        pack(shop)
    assert "relative" in caught.value.hint


def test_an_absolute_link_into_the_project_is_refused_for_it_would_point_elsewhere_there(shop: Path) -> None:
    (shop / "leaving").symlink_to(shop / "tako.toml")
    with pytest.raises(Refused, match="leaving -> "):
        pack(shop)


def test_sockets_and_pipes_are_left_where_they_are(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(shop / "pipe")
    monkeypatch.chdir(shop)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        assert names(pack(shop)) == {"tako.toml", "workflows/flows.py"}


def test_half_a_gigabyte_of_data_is_refused_with_the_largest_files_and_nothing_is_written(shop: Path) -> None:
    (shop / "data").mkdir()
    for number in range(3):
        with (shop / "data" / f"{number}.bin").open("wb") as file:
            file.truncate((number + 1) << 28)
    with pytest.raises(Refused, match=r"1\.5 GiB, and max_size is 200\.0 MiB: data/2\.bin \(768\.0 MiB\)") as caught:
        pack(shop)
    assert "max_size" in caught.value.hint
    assert not (shop / ".tako").exists()
    (shop / ".gitignore").write_text("data/\n")
    assert pack(shop).size < 1 << 24
    (shop / ".gitignore").unlink()
    (shop / "tako.toml").write_text('name = "shop"\n[deploy]\nmax_size = "1KiB"\n')
    with pytest.raises(Refused, match=r"max_size is 1\.0 KiB"):
        pack(shop)


# --- the same tree, the same release ---------------------------------------------------------------------------------


def test_the_same_tree_gives_the_same_bytes_and_id_wherever_it_is(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        shop = make_project(tmp_path / name, FLOWS)
        (shop / "run.sh").write_text("x")
        (shop / "run.sh").chmod(0o755)
        (shop / "link").symlink_to("run.sh")
        os.utime(shop / "run.sh", (len(made), len(made)))
        made.append(pack(shop))
    assert made[0].id == made[1].id
    assert made[0].file.read_bytes() == made[1].file.read_bytes()
    assert re.fullmatch(r"tree-[0-9a-f]{12}", made[0].id)
    clones = []
    commit(tmp_path / "one")
    for name in ("three", "four"):
        git(tmp_path, "clone", "-q", str(tmp_path / "one"), name)
        clones.append(pack(tmp_path / name))
    assert clones[0].id == clones[1].id == git(tmp_path / "one", "rev-parse", "HEAD")[:12]
    assert clones[0].digest == clones[1].digest


@pytest.mark.parametrize(
    "change",
    [
        lambda shop: (shop / "app.py").write_text("2"),
        lambda shop: (shop / "new.py").write_text(""),
        lambda shop: (shop / "app.py").unlink(),
        lambda shop: (shop / "app.py").chmod(0o755),
        lambda shop: (shop / "app.py").rename(shop / "moved.py"),
        lambda shop: ((shop / "app.py").unlink(), (shop / "app.py").symlink_to("tako.toml")),
        lambda shop: git(shop, "rm", "-q", "app.py"),
        lambda shop: ((shop / "app.py").write_text("2"), git(shop, "add", "-A")),
    ],
    ids=["edited", "new", "gone", "mode", "moved", "a link now", "removed in the index", "staged"],
)
def test_a_tree_that_differs_from_its_commit_says_so_with_a_hash_of_its_own(shop: Path, change: object) -> None:
    (shop / "app.py").write_text("1")
    head = commit(shop)
    assert pack(shop).id == head[:12]
    assert callable(change)
    change(shop)
    changed = pack(shop)
    assert re.fullmatch(rf"{head[:12]}-dirty-[0-9a-f]{{8}}", changed.id)
    assert (changed.dirty, changed.commit) == (True, head)
    assert pack(shop).id == changed.id
    (shop / "other.py").write_text("")
    assert pack(shop).id not in (changed.id, head[:12])


def test_what_is_never_sent_makes_no_tree_dirty(shop: Path) -> None:
    head = commit(shop)
    (shop / ".env").write_text("KEY=1")
    (shop / ".venv").mkdir()
    (shop / ".venv" / "pyvenv.cfg").write_text("")
    made = pack(shop)  # and .tako, which packing itself makes
    assert made.id == head[:12]


def test_an_edit_while_it_is_packed_cannot_go_by_the_commits_name(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "app.py").write_text("1")
    commit(shop)
    written = release._written

    def edited_first(*words: object) -> object:
        (shop / "app.py").write_text("2")
        return written(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(release, "_written", edited_first)
    made = pack(shop)
    assert made.dirty
    assert read(made, "app.py") == "2"


def test_a_file_that_goes_while_it_is_packed_is_named_and_nothing_is_left(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shop / "app.py").write_text("1")
    written = release._written

    def gone_first(*words: object) -> object:
        (shop / "app.py").unlink()
        return written(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(release, "_written", gone_first)
    with pytest.raises(Refused, match=r"app\.py cannot be packed"):
        pack(shop)
    assert not [path for path in (shop / ".tako" / "deploy").iterdir() if path.is_file()]


def test_every_id_is_safe_as_the_name_of_a_file_and_of_a_unit(shop: Path) -> None:
    seen = [pack(shop)]
    git(shop, "init", "-q", ".")
    seen.append(pack(shop))  # nothing committed yet
    commit(shop)
    seen.append(pack(shop))
    (shop / "app.py").write_text("")
    seen.append(pack(shop))
    assert [one.id.count("-") for one in seen] == [1, 1, 0, 2]
    for one in seen:
        assert re.fullmatch(SAFE, one.id)
        assert re.fullmatch(SAFE, one.other_id)
        assert one.other_id != one.id
        assert one.file.name == f"{one.id}.tar.gz"


def test_a_few_archives_stay_beside_the_project(shop: Path) -> None:
    for number in range(6):
        (shop / "app.py").write_text(str(number))
        made = pack(shop)
    kept = list((shop / ".tako" / "deploy").glob("*.tar.gz"))
    assert made.file in kept
    assert len(kept) == 3


# --- what a release has beside the files -----------------------------------------------------------------------------


def test_it_says_what_it_is_and_the_server_adds_what_it_was_told(shop: Path, tmp_path: Path) -> None:
    (shop / "tako.toml").write_text('name = "shop"\n[secrets]\nrequired = ["STRIPE_KEY"]\n')
    head = commit(shop)
    made = pack(shop, SERVER, NEWER)
    place = unpacked(made, tmp_path / "releases")
    told = json.loads((place / "RELEASE.json").read_text())
    assert (told["app"], told["id"], told["commit"], told["by"]) == ("shop", head[:12], head, "ada")
    assert (told["required"], told["digest"], told["vendored"]) == (["STRIPE_KEY"], made.digest, False)
    assert set(told["requirements"]) == {SERVER.tag, NEWER.tag}
    for path in [*told["requirements"].values(), told["pip"], *made.requirements.values()]:
        assert (place / path).is_file()
    declared = json.loads((place / ".release" / "manifest.json").read_text())
    assert [(flow["name"], flow["file"]) for flow in declared["workflows"]] == [("greet", "workflows/flows.py")]
    assert str(tmp_path) not in read(made, ".release/manifest.json") + read(made, "RELEASE.json")


def test_a_workflow_that_cannot_be_imported_fails_here_by_file_and_line_and_nothing_is_written(shop: Path) -> None:
    (shop / "workflows" / "broken.py").write_text("\nimport no_such_module\n")
    (shop / "workflows" / "cron.py").write_text(
        'from tako_runtime import workflow\n@workflow("x", schedule="* * *")\ndef x(step): ...\n'
    )
    with pytest.raises(ConfigError, match=r"^workflows/broken\.py:2: cannot be imported.*no_such_module") as caught:
        pack(shop)
    assert "workflows/cron.py:2: workflow 'x'" in str(caught.value)
    assert not list((shop / ".tako").rglob("*.tar.gz"))


def test_a_module_that_git_ignores_is_missed_here_and_not_on_the_server(shop: Path) -> None:
    (shop / "workflows" / "flows.py").write_text("import local_settings\n")
    (shop / "local_settings.py").write_text("")
    assert pack(shop).manifest.workflows == ()
    (shop / ".gitignore").write_text("local_settings.py\n")
    with pytest.raises(ConfigError, match="No module named 'local_settings'") as caught:
        pack(shop)
    assert "git ignores" in caught.value.hint


def test_workflows_that_git_ignores_are_said_loudly(shop: Path) -> None:
    commit(shop)
    (shop / ".gitignore").write_text("/workflows/local*.py\n")
    (shop / "workflows" / "local_only.py").write_text("")
    assert pack(shop).notes == ("a workflow is not sent, for git ignores it: workflows/local_only.py",)
    git(shop, "rm", "-q", "--cached", "-r", "workflows")
    (shop / ".gitignore").write_text("workflows/\n")
    with pytest.raises(Refused, match="no workflow would be sent: workflows/ is there, but git ignores it") as caught:
        pack(shop)
    assert "git check-ignore -v workflows/" in caught.value.hint


def test_an_ignored_tako_toml_and_a_name_of_takos_own_are_refused(shop: Path) -> None:
    (shop / ".gitignore").write_text("tako.toml\n")
    with pytest.raises(Refused, match=r"git ignores tako\.toml"):
        pack(shop)
    (shop / ".gitignore").unlink()
    (shop / "RELEASE.json").write_text("{}")
    with pytest.raises(Refused, match=r"RELEASE\.json: that name is tako's own"):
        pack(shop)


def test_an_empty_project_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tako.toml").write_text('name = "shop"\n')
    with pytest.raises(ConfigError, match="there is no folder 'workflows'") as caught:
        release.pack(load(tmp_path), "production", [SERVER])
    assert "tako-pack-" not in str(caught.value)


def test_the_manifest_is_read_with_the_variables_and_secrets_of_the_environment(shop: Path) -> None:
    (shop / "tako.toml").write_text('name = "shop"\n[vars.production]\nPLACE = "production"\n')
    (shop / "workflows" / "flows.py").write_text(
        "import os\nfrom tako_runtime import secrets\n"
        "assert os.environ['PLACE'] == os.environ['TAKO_ENV'] == 'production'\n"
        "assert secrets['KEY'] == 'x12345'\n"
    )
    release.pack(load(shop), "production", [SERVER], secrets={"KEY": "x12345"})
    with pytest.raises(ConfigError, match="the secret KEY is not set"):
        release.pack(load(shop), "production", [SERVER])


def test_what_is_packed_installs_on_a_server_with_nothing_but_python_and_declares_the_same(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real packages: from the index that pip is set up with, and then, vendored, from nowhere."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (shop / "tako.toml").write_text('name = "shop"\n[deploy]\nvendor = true\n')
    from tako_cli.deploy.lock import Target

    here = Target.here()
    try:
        made = pack(shop, here)
    except TakoError as error:
        pytest.skip(f"no index here: {error}")
    place = unpacked(made, tmp_path / "releases")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=place, check=True)
    words = [sys.executable, str(place / made.pip / "pip"), "--python", "../.venv", "install", "--quiet"]
    words += ["--require-hashes", "-r", Path(made.requirements[here]).name]
    away = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "https_proxy": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
    done = subprocess.run(words, cwd=place / ".release", env=away, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    declared = subprocess.run(
        [".venv/bin/python", "-m", "tako_runtime", "manifest"], cwd=place, capture_output=True, check=True
    ).stdout
    assert [flow["name"] for flow in json.loads(declared)["workflows"]] == ["greet"]
