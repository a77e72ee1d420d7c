"""`tako doctor` finds what is broken: each thing is broken here for real, and found by the real command."""

import contextlib
import doctest
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from cli import TAKO, at_terminal, developing, done, environment, make_project, plain, start, tako
from conftest import until
from serving import keep_secrets

from tako_cli.doctor import disk, machine
from tako_cli.doctor.project import sockets
from tako_runtime import clock, holders
from tako_runtime import disk as runtime_disk
from tako_runtime.bell import Bell
from tako_runtime.disk import of_mounts
from tako_runtime.store import Home, project_home
from tako_runtime.store.queries import migrations

# They run processes of their own.
pytestmark = pytest.mark.slow

MACHINE = ["python", "sqlite", "zones", "clock", "ssh", "completions"]
PROJECT = ["tako.toml", "environment", "disk", "space", "store", "sockets", "secrets", "workflows"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    config = f'name = "shop"\n[app]\ncommand = ["true"]\nport = {free_port()}\n'
    return make_project(tmp_path / "shop", config=config)


def findings(cwd: Path, **env: str) -> dict[str, dict[str, Any]]:
    """What `tako doctor --json` says, by check: the worst of each."""
    ended = tako("doctor", "--json", cwd=cwd, **env)
    assert ended.stderr == ""
    found = json.loads(ended.stdout)["doctor"]
    assert all(list(one) == ["check", "ok", "message", "mend"] for one in found)
    assert all(one["mend"] for one in found if not one["ok"]), "what is broken has its mend"
    assert ended.returncode == (0 if all(one["ok"] for one in found) else 1)
    worst = sorted(found, key=lambda one: (not one["ok"], bool(one["mend"])))
    return {
        check: next(one for one in reversed(worst) if one["check"] == check) for check in [f["check"] for f in found]
    }


def mend(words: str, **env: str) -> None:
    """Do what it says, as a person would who copies it."""
    subprocess.run(["sh", "-c", words], check=True, env=environment(**env))


def is_well(one: dict[str, Any]) -> bool:
    return bool(one["ok"]) and not one["mend"]


def is_warning(one: dict[str, Any]) -> bool:
    return bool(one["ok"]) and bool(one["mend"])


@pytest.fixture
def quick(project: Path) -> Iterator[Path]:
    """A project whose workflows are imported in no time."""
    (project / "workflows" / "flows.py").write_text("")
    return project


# --- all is well -----------------------------------------------------------------------------------------------------


def test_in_a_sound_project_all_is_well_and_it_ends_with_0(project: Path) -> None:
    start(project, "nap", {})
    found = findings(project)
    assert list(found) == [*MACHINE, *PROJECT, "port"]
    assert [name for name in PROJECT if not is_well(found[name])] == []
    assert "1 run," in found["store"]["message"]
    assert "6 declared, 1 on a schedule" in found["workflows"]["message"]
    assert tako("doctor", cwd=project).returncode == 0


def test_outside_a_project_it_looks_at_the_machine_only(tmp_path: Path) -> None:
    assert list(findings(tmp_path)) == MACHINE


def test_it_changes_nothing_and_makes_no_store(quick: Path) -> None:
    assert "none yet" in findings(quick)["store"]["message"]
    assert not (quick / ".tako").exists()


def test_while_tako_dev_runs_the_store_is_sound_and_nobody_is_disturbed(project: Path) -> None:
    with developing(project) as dev:
        run = start(project, "nap", {})
        dev.wait_for("run.sleeping", lambda event: event["run"] == run)
        found = findings(project)
        assert is_well(found["store"]), found["store"]
        assert is_well(found["sockets"]), found["sockets"]
        start(project, "greet", "Ada")
        dev.wait_for("run.succeeded")
        dev.send(signal.SIGINT)
        assert dev.ended() == 0


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_person_sees_each_thing_with_its_mend_and_a_last_word(columns: int, quick: Path) -> None:
    keep_secrets(project_home("shop", quick), {})
    (quick / "tako.toml").write_text('name = "shop"\n[secrets]\nrequired = ["STRIPE_KEY"]\n')
    code, shown = at_terminal("doctor", cwd=quick, columns=columns, SHELL="/bin/none")
    lines = plain(shown).splitlines()
    assert code == 1
    [at] = [at for at, line in enumerate(lines) if line.startswith("broken")]
    assert lines[at].split() == ["broken", "secrets", "not", "set:", "STRIPE_KEY"]
    assert lines[at + 1].startswith("         mend: tako secrets set STRIPE_KEY")
    assert "1 broken" in lines[-1]


# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_python_or_a_sqlite_that_is_too_old_is_broken() -> None:
    assert not machine.python((3, 10, 4), Path("/usr/bin/python3")).ok
    assert machine.python(sys.version_info[:3], Path(sys.executable)).level == "ok"
    assert not machine.sqlite("3.40.1").ok
    assert not machine.sqlite("3.51.2").ok
    assert machine.sqlite("3.51.3").ok
    assert machine.sqlite(apsw.sqlite_lib_version()).level == "ok"


def test_a_machine_without_data_of_time_zones_is_broken(tmp_path: Path) -> None:
    """Neither the system's own nor the package's."""
    (tmp_path / "tzdata").mkdir()
    (tmp_path / "tzdata" / "__init__.py").touch()
    found = findings(tmp_path, PYTHONTZPATH=str(tmp_path / "nowhere"), PYTHONPATH=str(tmp_path))["zones"]
    assert not found["ok"]
    assert "tzdata" in found["mend"]


def test_a_clock_that_cannot_be_right_or_jumps_is_broken_and_one_that_nothing_sets_is_a_warning() -> None:
    now = clock.SystemClock().now()
    assert not machine.time(clock.DAY, 0, None).ok
    assert not machine.time(now, -5 * clock.SECOND, True).ok
    assert machine.time(now, clock.SECOND // 2, None).level == "ok"
    assert machine.time(now, 0, False).level == "warning"


@pytest.mark.parametrize(("said", "warns"), [("no", True), ("yes", False), ("", False)])
def test_what_systemd_says_of_the_clock_is_told(said: str, warns: bool, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "timedatectl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$*" = "show --property NTPSynchronized --value" ] && echo {said}\n')
    program.chmod(0o755)
    found = findings(tmp_path, PATH=f"{program.parent}{os.pathsep}{os.environ['PATH']}")["clock"]
    assert is_warning(found) == warns
    assert ("set from the network" in found["message"]) == bool(said)


def test_without_ssh_a_project_that_deploys_is_broken_and_another_one_is_warned(quick: Path) -> None:
    empty = quick / "empty"
    empty.mkdir()
    assert is_warning(findings(quick, PATH=str(empty))["ssh"])
    with (quick / "tako.toml").open("a") as file:
        file.write('[servers.web-1]\nhost = "web-1.example.com"\n')
    assert not findings(quick, PATH=str(empty))["ssh"]["ok"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_that_are_missing_or_of_another_version_are_warned_of_and_the_mend_mends_it(
    shell: str, tmp_path: Path
) -> None:
    told = {"HOME": str(tmp_path), "SHELL": f"/bin/{shell}"}
    missing = findings(tmp_path, **told)["completions"]
    assert is_warning(missing)
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    mend(missing["mend"], PATH=beside_python, **told)
    assert is_well(findings(tmp_path, **told)["completions"])
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    file.write_text("complete -W old tako\n")
    assert "is not what this tako would write" in findings(tmp_path, **told)["completions"]["message"]


# --- the project -----------------------------------------------------------------------------------------------------


def test_a_wrong_tako_toml_is_told_with_its_line_and_the_machine_is_looked_at_all_the_same(quick: Path) -> None:
    (quick / "tako.toml").write_text('name = "shop"\n[workflows]\nconcurency = 3\n')
    found = findings(quick)
    assert list(found) == [*MACHINE, "tako.toml"]
    assert "tako.toml:3: workflows.concurency" in found["tako.toml"]["message"]
    assert "workflows.concurrency" in found["tako.toml"]["mend"]


def test_half_of_what_names_a_store_is_broken(quick: Path) -> None:
    found = findings(quick, TAKO_APP_NAME="shop")
    assert not found["settings"]["ok"]
    assert "TAKO_DATA_DIR is not" in found["settings"]["message"]


def test_a_tako_that_runs_outside_the_projects_own_environment_is_warned_of(quick: Path) -> None:
    assert is_well(findings(quick)["environment"])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", quick / ".venv"], check=True)
    assert is_warning(findings(quick)["environment"])


def test_workflows_that_cannot_be_imported_are_named_with_their_line(project: Path) -> None:
    (project / "workflows" / "bad.py").write_text("import json\n\njson.nothing\n")
    found = findings(project)["workflows"]
    assert not found["ok"]
    assert "workflows/bad.py:3: cannot be imported: AttributeError" in found["message"]
    shutil.rmtree(project / "workflows")
    assert "no folder 'workflows'" in findings(project)["workflows"]["message"]


def test_required_secrets_that_are_missing_and_a_file_that_others_may_read_are_broken(quick: Path) -> None:
    (quick / "tako.toml").write_text('name = "shop"\n[secrets]\nrequired = ["STRIPE_KEY", "DATABASE_URL"]\n')
    path = keep_secrets(project_home("shop", quick), {"STRIPE_KEY": "sk_live_12345"})
    found = findings(quick)["secrets"]
    assert (found["ok"], found["message"]) == (False, "not set: DATABASE_URL")
    keep_secrets(project_home("shop", quick), {"STRIPE_KEY": "sk_live_12345", "DATABASE_URL": "postgresql://"})
    assert is_well(findings(quick)["secrets"])
    path.chmod(0o640)
    found = findings(quick)["secrets"]
    assert not found["ok"]
    mend(found["mend"].partition(",")[0])
    assert is_well(findings(quick)["secrets"])


# --- the store -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(project: Path) -> Path:
    """The store of a project that has a run, all of it in the one file."""
    start(project, "nap", {"text": "x" * 5_000})
    with contextlib.closing(apsw.Connection(str(project / ".tako/apps/shop/runs.db"))) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return project / ".tako/apps/shop/runs.db"


@pytest.mark.parametrize("how", ["a page", "the head", "an index"])
def test_a_damaged_store_is_broken_and_the_mend_begins_anew(how: str, file: Path, project: Path) -> None:
    if how == "an index":  # one that lacks a row that its table has
        with contextlib.closing(apsw.Connection(str(file))) as db:
            db.execute("PRAGMA journal_mode = DELETE").fetchall()
            root = db.execute(
                "SELECT rootpage FROM sqlite_schema WHERE type = 'index' AND tbl_name = 'runs'"
            ).fetchone()
            size = int(db.pragma("page_size"))
        assert root is not None
        with file.open("r+b") as out:
            out.seek((int(str(root[0])) - 1) * size + 3)
            out.write(b"\xff\xff")
    else:
        with file.open("r+b") as out:
            out.seek(0 if how == "the head" else 4096)
            out.write(os.urandom(4096))
    found = findings(project)["store"]
    assert not found["ok"]
    assert "is damaged" in found["message"]
    assert "tako dev --fresh" in found["mend"]
    done("dev", "--fresh", "--once", cwd=project)
    assert is_well(findings(project)["store"])


def test_a_store_of_a_newer_tako_is_broken_and_one_of_an_older_is_not(file: Path, project: Path) -> None:
    with contextlib.closing(apsw.Connection(str(file))) as db:
        db.execute("PRAGMA user_version = 9999; UPDATE store SET serves = 9999")
        found = findings(project)["store"]
        assert not found["ok"]
        assert "version 9999" in found["message"]
    file.unlink()
    with contextlib.closing(apsw.Connection(str(file))) as db:
        db.execute(migrations("sqlite")[0][1])
        db.execute("PRAGMA user_version = 1")
    file.chmod(0o600)
    found = findings(project)["store"]
    assert is_well(found)
    assert "version 1," in found["message"]


def test_a_store_that_somebody_has_altered_is_broken_and_says_what_does_not_fit(file: Path, project: Path) -> None:
    with contextlib.closing(apsw.Connection(str(file))) as db:
        db.execute("PRAGMA user_version = 1")
    found = findings(project)["store"]
    assert not found["ok"]
    assert "says that it has version 1, and lacks runs_finished" in found["message"]


def test_a_run_from_the_future_says_that_the_clock_was_or_is_wrong(file: Path, project: Path) -> None:
    with contextlib.closing(apsw.Connection(str(file))) as db:
        db.execute("UPDATE runs SET created_at = created_at + ?", (3 * clock.DAY,))
    found = findings(project)["store"]
    assert is_warning(found)
    assert "from now" in found["message"]


def test_a_store_that_others_may_read_is_warned_of_and_the_mend_mends_it(file: Path, project: Path) -> None:
    file.chmod(0o644)
    found = findings(project)["store"]
    assert is_warning(found)
    mend(found["mend"])
    assert is_well(findings(project)["store"])


def test_a_store_that_is_no_file_is_broken(quick: Path) -> None:
    (quick / ".tako/apps/shop/runs.db").mkdir(parents=True, mode=0o700)
    assert not findings(quick)["store"]["ok"]


# --- the disk --------------------------------------------------------------------------------------------------------


def mounts() -> bool:
    """Whether this user may mount something where only its own process sees it."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


can_mount = pytest.mark.skipif(not mounts(), reason="this machine lets nobody mount a disk of its own")


@can_mount
def test_a_disk_that_is_full_is_broken_and_its_kind_is_told(quick: Path) -> None:
    (quick / ".tako").mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o size=1m tmpfs "{quick / ".tako"}" && exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *TAKO, "doctor", "--json"]
    ended = subprocess.run(words, cwd=quick, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    found = {one["check"]: one for one in json.loads(ended.stdout)["doctor"]}
    assert found["disk"]["message"] == "tmpfs"
    assert not found["space"]["ok"]
    assert "free" in found["space"]["message"]


@pytest.mark.parametrize(("kind", "broken"), [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("ext4", False)])
def test_a_store_on_a_network_disk_is_broken(kind: str, broken: bool) -> None:
    table = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"40 22 0:50 / /srv/team\\040disk rw,relatime shared:9 master:2 - {kind} nas:/export rw,vers=4.2\n"
        "41 22 0:51 / /srv/team rw - xfs /dev/sdb1 rw\n"
    )
    folder = Path("/srv/team disk/shop/.tako")
    found = disk.network(folder, of_mounts(folder, table))
    assert found.ok != broken
    assert of_mounts(Path("/srv/team/shop"), table) == "xfs"
    assert of_mounts(Path("/home"), table) == "ext4"


def test_the_examples_in_its_docstrings_hold() -> None:
    assert doctest.testmod(disk) == (0, 1)
    assert doctest.testmod(runtime_disk) == (0, 1)


# --- the port and the sockets ----------------------------------------------------------------------------------------


def port_of(project: Path) -> int:
    return int((project / "tako.toml").read_text().rpartition("=")[2])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 -- it is what an app might do
def test_a_port_that_is_taken_is_broken_with_the_process_that_holds_it(address: str, quick: Path) -> None:
    port = port_of(quick)
    assert is_well(findings(quick)["port"])
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", address], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd=quick,
    )  # fmt: skip
    try:
        until(lambda: holders.of_port(port))
        found = findings(quick)["port"]
        assert not found["ok"]
        assert f"process {server.pid} (" in found["message"]
        assert "http.server" in found["message"]
        assert f"kill {server.pid}" in found["mend"]
    finally:
        server.kill()
        server.wait()
    assert is_well(findings(quick)["port"])


def test_a_port_that_this_projects_own_tako_dev_holds_is_well(project: Path) -> None:
    """As its app does: here a step has started a server, which is below it just the same."""
    port = port_of(project)
    (project / "workflows" / "serve.py").write_text(
        "import subprocess, sys\nfrom tako_runtime import workflow\n"
        "@workflow('serve')\nasync def serve(step):\n"
        f"    await step.run('serve', subprocess.run, [sys.executable, '-m', 'http.server', '{port}'])\n"
    )
    with developing(project) as dev:
        start(project, "serve")
        until(lambda: holders.of_port(port))
        found = findings(project)["port"]
        assert is_well(found), found
        assert f"process {dev.process.pid}" in found["message"]


def test_sockets_that_a_crash_has_left_are_warned_of_and_the_mend_removes_them(quick: Path, home: Home) -> None:
    told = home.environment()
    listener = Bell(home.app_dir).listen("w-alive")
    path = home.app_dir / "bell" / "w-gone"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
        gone.bind(str(path))
    found = findings(quick, **told)["sockets"]
    assert is_warning(found)
    assert found["mend"] == f"rm {path}"
    mend(found["mend"])
    assert is_well(findings(quick, **told)["sockets"])
    assert (home.app_dir / "bell" / "w-alive").exists()
    listener.close()


def test_a_path_that_is_too_long_for_sockets_is_broken_where_there_is_no_short_one(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = Home("shop", home.data_dir / ("x" * 60) / ("y" * 60))
    [found] = sockets(deep)
    assert found.level == "ok", "the short one is taken"
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # /tmp/tako-4000000 will be somebody else's
    try:
        [found] = sockets(deep)
        assert not found.ok
        assert "too long" in found.message
    finally:
        shutil.rmtree("/tmp/tako-4000000", ignore_errors=True)
