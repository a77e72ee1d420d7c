"""What is in a project's way: where the store has to be and cannot, what is asked for and is not there."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from cli import document, make_project, tako
from conftest import unprivileged, until
from serving import serving
from workers import shown

from tako_runtime.control import Control
from tako_runtime.errors import StoreError
from tako_runtime.manifest import Declared
from tako_runtime.server import alone
from tako_runtime.store import Home, open_store, project_home
from tako_runtime.store.sqlite import SqliteStore

ASKS = """
    import os
    from tako_runtime import workflow

    @workflow("asks")
    async def asks(step) -> str:
        return os.environ["TAKO_ENV"]
"""


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


def test_serve_refuses_an_environment_that_the_file_does_not_know_and_names_the_nearest(home: Home) -> None:
    root = make_project(home.data_dir / "project", flows=ASKS, config='name = "shop"\n[vars.staging]\nA = "1"\n')

    def refused(env: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "tako_runtime", "serve", "--env", env], cwd=root, capture_output=True, text=True,
            env={**os.environ, **home.environment()}, timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 1
        return ended.stderr

    assert 'there is no environment "stagin"\nDid you mean staging?' in refused("stagin")
    assert "Did you mean production?" in refused("prodution"), "it is there, whatever the file has"
    assert "There is: staging, development, production." in refused("x")
    with closing(open_store(home)) as opened:
        for env in ("production", "staging"):
            new = Control(opened).start(Declared("asks", "default", 0, 0, 0, None, "flows.py", 1), "null")
            with serving(home, root, "--env", env):
                until(lambda run=new.id: shown(opened, run)["status"] == "succeeded")
            assert shown(opened, new.id)["result"] == env
