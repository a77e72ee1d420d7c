"""What is in a project's way: where the store has to be and cannot, what is asked for and is not there."""

from pathlib import Path

import pytest
from cli import document, make_project, tako
from conftest import unprivileged

from tako_runtime.errors import StoreError
from tako_runtime.server import alone
from tako_runtime.store import Home, project_home
from tako_runtime.store.sqlite import SqliteStore


def test_a_file_where_the_stores_folder_has_to_be_is_named_by_every_command(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop")
    (project / ".tako").touch()
    for words in (["dev", "--once"], ["status"], ["runs", "ls"], ["runs", "start", "greet"], ["cron", "ls"]):
        ended = tako(*words, cwd=project)
        assert ended.returncode == 1, words
        assert ended.stderr == (
            f"error: {project / '.tako'} is a file, and a folder for the store has to be there\n"
            "Move it away, or rename it: tako makes the folder.\n"
        )
    [store] = [one for one in document("doctor", cwd=project, code=1)["doctor"] if one["check"] == "store"]
    assert not store["ok"]
    assert "is a file" in store["message"]
    assert (project / ".tako").is_file()


def test_a_project_that_cannot_be_written_to_says_so_and_what_it_takes(home: Home) -> None:
    home.data_dir.chmod(0o755)
    there = home.data_dir / "shop"
    there.mkdir(mode=0o755)
    found = project_home("shop", there)
    with unprivileged():
        with pytest.raises(StoreError, match="Permission denied") as caught, alone(found.app_dir, "tako dev"):
            pass
        assert f"needs to write to {there}" in caught.value.hint
        with pytest.raises(StoreError, match="cannot be opened: Permission denied"):
            SqliteStore(found.app_dir / "runs.db")
    (home.data_dir / "mine").mkdir(mode=0o700)
    with unprivileged(), pytest.raises(StoreError) as caught, alone(home.data_dir / "mine" / "x" / "apps", "tako dev"):
        pass
    assert "owner and mode" in caught.value.hint
