"""`tako dev --fresh` begins with an empty store, and loses nothing."""

import os
import signal
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from cli import at_terminal, developing, document, done, make_project, plain, start, tako
from conftest import finished, script

from tako_runtime.store import examine, open_store, project_home
from tako_runtime.store.base import CountRuns

# They run processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop")


def listed(project: Path) -> list[str]:
    return [run["id"] for run in document("runs", "ls", cwd=project)["runs"]]


def test_it_begins_with_an_empty_store_says_how_many_runs_went_and_keeps_them(project: Path) -> None:
    runs = [start(project, "nap", {}), start(project, "greet", "Ada")]
    with developing(project, "--fresh", "--once") as dev:
        fresh = dev.wait_for("dev.fresh")
        assert dev.ended() == 0
    assert (fresh["runs"], fresh["kept_in"]) == (2, ".tako/apps/shop/runs-before.db")
    assert listed(project) == []
    assert not (project / "bodies.txt").exists(), "none of them was taken up"
    folder = project / ".tako/apps/shop"
    (folder / "runs-before.db").replace(folder / "runs.db")
    assert sorted(listed(project)) == sorted(runs)


def test_what_a_crash_had_left_in_the_write_ahead_log_is_kept_too(project: Path) -> None:
    run = start(project, "nap", {})
    path = project_home("shop", project).app_dir / "runs.db"
    code = """
        import os, sys, apsw
        db = apsw.Connection(sys.argv[1])
        db.execute("UPDATE runs SET priority = 7")
        os._exit(0)  # with the file open: its log is left behind
    """
    finished(script(code, path))
    assert Path(f"{path}-wal").stat().st_size > 0
    done("dev", "--fresh", "--once", cwd=project)
    before = path.with_name("runs-before.db")
    with closing(apsw.Connection(str(before))) as db:
        assert db.execute("SELECT id, priority FROM runs").fetchall() == [(run, 7)]
    assert listed(project) == []


def test_the_store_that_was_put_aside_last_makes_room_for_the_next(project: Path) -> None:
    start(project, "nap", {})
    done("dev", "--fresh", "--once", cwd=project)
    for _ in range(2):
        start(project, "nap", {})
    assert "2 runs went to" in done("dev", "--fresh", "--once", cwd=project)
    with closing(apsw.Connection(str(project / ".tako/apps/shop/runs-before.db"))) as db:
        assert db.execute("SELECT count(*) FROM runs").fetchall() == [(2,)]


def test_without_a_store_it_is_a_first_start_and_says_nothing_of_it(project: Path) -> None:
    assert "went to" not in done("dev", "--fresh", "--once", cwd=project)
    assert "0 runs went to" in done("dev", "--fresh", "--once", cwd=project)


def test_it_is_refused_while_another_tako_dev_runs_and_that_one_keeps_its_runs(project: Path) -> None:
    run = start(project, "nap", {})
    with developing(project) as dev:
        dev.wait_for("run.sleeping", lambda event: event["run"] == run)
        error = document("dev", "--fresh", cwd=project, code=1)["error"]
        assert error["code"] == "refused"
        assert str(dev.process.pid) in error["message"]
        dev.send(signal.SIGTERM)
        assert dev.ended() == 0
    assert listed(project) == [run]


def test_it_is_refused_with_the_process_that_has_the_store_open_which_would_go_on_in_the_old_one(project: Path) -> None:
    run = start(project, "nap", {})
    with closing(open_store(project_home("shop", project))) as opened:
        opened.do_sync(CountRuns())
        error = document("dev", "--fresh", cwd=project, code=1)["error"]
    assert f"process {os.getpid()} (" in error["message"]
    assert listed(project) == [run]


@pytest.mark.parametrize("how", ["damaged", "too new"])
def test_a_store_that_this_tako_cannot_open_is_put_aside_as_it_is(how: str, project: Path) -> None:
    start(project, "nap", {})
    path = project / ".tako/apps/shop/runs.db"
    if how == "damaged":
        path.write_bytes(b"not a database, though it is long enough to be one" * 100)
    else:
        with closing(apsw.Connection(str(path))) as db:
            db.execute("PRAGMA user_version = 9999; UPDATE store SET serves = 9999")
    before = path.read_bytes()
    assert tako("dev", "--once", cwd=project).returncode == 1
    said = done("dev", "--fresh", "--once", cwd=project)
    assert ("a store that cannot be read" if how == "damaged" else "1 run went to") in said
    if how == "damaged":
        assert path.with_name("runs-before.db").read_bytes() == before
    seen = examine(project_home("shop", project))
    assert seen is not None
    assert (seen.damage, seen.runs) == ((), 0)
    assert seen.version == seen.newest


def test_secrets_stay(project: Path) -> None:
    from serving import keep_secrets

    path = keep_secrets(project_home("shop", project), {"STRIPE_KEY": "sk_live_1"})
    start(project, "nap", {})
    done("dev", "--fresh", "--once", cwd=project)
    assert path.is_file()


@pytest.mark.parametrize("columns", [60, 100])
def test_a_person_sees_what_went(columns: int, project: Path) -> None:
    start(project, "nap", {})
    _, shown = at_terminal("dev", "--fresh", "--once", cwd=project, columns=columns)
    assert "the store is empty: 1 run went to" in " ".join(plain(shown).split())
    assert max(map(len, plain(shown).splitlines())) <= columns
