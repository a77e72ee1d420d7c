"""A copy of the store, made while all goes on, and put back."""

import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from afar import Web, deployed
from cli import FLOWS, document, make_project, start, tako
from conftest import Caller, script, until

from tako_runtime import store
from tako_runtime.errors import NotFound, Refused, StoreError
from tako_runtime.store import Home
from tako_runtime.store.copying import checked

# They run processes of their own.
pytestmark = pytest.mark.slow

LOCAL = """
    @workflow("warm", local=True)
    async def warm(payload, step):
        return payload
"""


def runs_in(file: Path) -> int:
    with sqlite3.connect(file) as db:
        return int(db.execute("SELECT count(*) FROM runs").fetchone()[0])


def test_a_copy_is_one_sound_file_of_what_was_acknowledged_though_others_write(
    home: Home, caller: Caller, tmp_path: Path
) -> None:
    """Before it is made, and none of it half: a process writes on all the time."""
    code = """
        import sys
        from pathlib import Path
        from tako_runtime import clock, store
        from tako_runtime.run import NewRun, new_id
        from tako_runtime.store import Home, base, open_store

        opened = open_store(Home("shop", Path(sys.argv[1])))
        while True:
            now = clock.SystemClock().now()
            runs = [NewRun(new_id(now), "order", "default", "null", now, now, 0, 0, 0) for _ in range(10)]
            opened.do_sync(base.Enqueue(runs=runs, now=now))
            print(10, flush=True)
    """
    writing = script(code, home.data_dir)
    assert writing.stdout is not None
    try:
        before = sum(int(writing.stdout.readline()) for _ in range(20))
        store.backup(home, tmp_path / "copy.db")
        after = int(writing.stdout.readline())
        assert after == 10, "it went on"
    finally:
        writing.kill()
        writing.communicate()
    found = checked(tmp_path / "copy.db")
    assert found.runs >= before
    assert found.runs % 10 == 0
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["copy.db"]


def test_what_is_no_sound_copy_is_not_put_back_and_all_is_as_it_was(home: Home, tmp_path: Path) -> None:
    opened = store.open_store(home)
    Caller(opened).enqueue()
    opened.close()
    store.backup(home, tmp_path / "copy.db")
    whole = (tmp_path / "copy.db").read_bytes()
    before = (home.app_dir / "runs.db").read_bytes()
    for data in (b"", b"no store at all" * 100, whole[: len(whole) // 2]):
        with pytest.raises(StoreError):
            store.restore(home, io.BytesIO(data))
        assert (home.app_dir / "runs.db").read_bytes() == before
    assert not [path for path in home.app_dir.iterdir() if path.name.startswith(".")]


def test_a_store_that_somebody_has_open_is_not_replaced(home: Home, caller: Caller, tmp_path: Path) -> None:
    caller.enqueue()
    store.backup(home, tmp_path / "copy.db")
    with pytest.raises(Refused, match="is open in"), (tmp_path / "copy.db").open("rb") as data:
        store.restore(home, data)


def test_where_there_is_no_store_there_is_no_copy(home: Home, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no store"):
        store.backup(home, tmp_path / "copy.db")
    assert list(tmp_path.iterdir()) == []


def test_a_projects_own_store_is_copied_and_put_back(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop")
    run = start(project, "greet", "Ada")
    made = document("backup", "--env", "development", "--output", "copy.db", cwd=project)["backup"]
    assert made["runs"] == runs_in(project / "copy.db") == 1
    again = tako("backup", "--env", "development", "--output", "copy.db", cwd=project)
    assert again.returncode == 1
    assert "copy.db is there already" in again.stderr
    start(project, "greet", "Bob")
    asked = tako("restore", "copy.db", "--env", "development", cwd=project)
    assert asked.returncode == 2
    assert "Say --yes." in asked.stderr
    told = document("restore", "copy.db", "--env", "development", "--yes", cwd=project)["restored"]
    assert told["runs"] == 1
    assert [one["id"] for one in document("runs", "ls", cwd=project)["runs"]] == [run]
    assert runs_in(Path(told["aside"])) == 2


@pytest.mark.parametrize("dialect", ["postgres"])
def test_local_runs_beside_a_database_are_copied_and_put_back_by_themselves(home: Home, tmp_path: Path) -> None:
    config = f'name = "shop"\n[storage]\nurl = "{home.url}"\n'
    project = make_project(tmp_path / "shop", FLOWS + LOCAL, config)
    where = ("--env", "development")
    nothing = tako("backup", "--local", *where, cwd=project)
    assert nothing.returncode == 4, nothing.stderr
    local, shared = start(project, "warm", "Ada"), start(project, "greet", "Bob")
    refused = tako("backup", *where, cwd=project)
    assert refused.returncode == 1
    assert "pg_dump --format=custom" in refused.stderr
    assert "local workflows here: say --local" in " ".join(refused.stderr.split())
    made = document("backup", "--local", "--output", "own.db", *where, cwd=project)["backup"]
    assert made["runs"] == runs_in(project / "own.db") == 1
    start(project, "warm", "Eve")
    told = document("restore", "own.db", "--local", "--yes", *where, cwd=project)["restored"]
    assert (told["runs"], runs_in(Path(told["aside"]))) == (1, 2)
    assert {one["id"] for one in document("runs", "ls", cwd=project)["runs"]} == {local, shared}
    without = tako("restore", "own.db", "--yes", *where, cwd=project)
    assert without.returncode == 1
    assert "--local" in without.stderr


@pytest.fixture
def web() -> Iterator[Web]:
    with deployed(FLOWS) as one:
        yield one


def test_a_servers_store_is_copied_while_it_runs_and_put_back_once_it_is_stopped(web: Web) -> None:
    serving = web.serve()
    run = web.start("ask", {})
    until(lambda: web.document("runs", "show", run)["run"]["reason"] == "waiting")
    made = web.document("backup")["backup"]
    copy = web.project / made["file"]
    assert made["file"].startswith(f"{web.app}-production-")
    assert runs_in(copy) == made["runs"] == 1
    assert copy.stat().st_mode & 0o777 == 0o600
    assert not list(web.app_dir.glob(".backup*"))
    refused = web.afar("restore", made["file"], "--yes")
    assert refused.returncode == 1
    assert "is open in process" in refused.stderr
    web.document("runs", "cancel", run)
    serving.terminate()
    serving.wait()
    told = web.document("restore", made["file"], "--yes")["restored"]
    assert told["runs"] == 1
    assert web.document("runs", "show", run)["run"]["reason"] == "waiting", "it is as it was"
    assert runs_in(Path(told["aside"])) == 1
    nothing = web.afar("restore", "nosuch.db", "--yes")
    assert nothing.returncode == 4
    assert json.loads(web.afar("restore", "tako.toml", "--yes", "--json").stdout)["error"]["code"].startswith("store")
