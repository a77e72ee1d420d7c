"""Secrets that change while an app runs: put on the server from the laptop, and who has the old ones until when."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from afar import Web, deployed
from cli import is_alive
from conftest import until

from tako_runtime import rotation
from tako_runtime.secrets import envelope, stored

pytestmark = pytest.mark.slow

FLOWS = """
    import time
    from pathlib import Path

    from tako_runtime import secrets, workflow

    def known():
        return secrets["KEY"][-3:]

    def wait():
        Path("begun").touch()
        while not Path("go").exists():
            time.sleep(0.02)
        return known()

    @workflow("reads")
    async def reads(payload, step):
        return await step.run("read", known)

    @workflow("holds", retries=0)
    async def holds(payload, step):
        first = await step.run("first", wait)
        return [first, await step.run("second", known)]
"""

OLD, NEW = "sk_live_before_one", "sk_live_after_two"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("HOME", str(tmp_path / "laptop"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "laptop"))
    (tmp_path / "laptop").mkdir()
    with deployed(FLOWS) as one:
        yield one


def push(web: Web, *words: str) -> dict[str, object]:
    ended = web.tako("secrets", "push", "--json", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    [row] = json.loads(ended.stdout)["servers"]
    return dict(row)


def keep(web: Web, value: str) -> None:
    assert web.afar("secrets", "set", "KEY", stdin=value).returncode == 0


def result(web: Web, run: str) -> object:
    until(lambda: web.document("runs", "show", run)["run"]["status"] not in ("pending", "running"), 60)
    found = web.document("runs", "show", run)["run"]
    assert found["status"] == "succeeded", found
    assert found["attempt"] == 1
    return found["result"]


def test_a_rotation_replaces_workers_at_their_next_step_and_uses_up_no_attempt(web: Web) -> None:
    keep(web, OLD)
    assert push(web) == {"server": "web-1", "changed": ["KEY"], "told": False, "running": False, "error": None}
    file = web.app_dir / "secrets.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    web.serve()
    run = web.start("holds")
    until(lambda: (web.release / "begun").exists())
    keep(web, NEW)
    assert push(web) == {"server": "web-1", "changed": ["KEY"], "told": True, "running": True, "error": None}
    until(lambda: web.document("status")["status"]["secrets"]["old"])
    status = web.document("status")["status"]
    [held] = status["secrets"]["old"]
    old = held["pid"]
    assert old in [worker["pid"] for worker in status["workers"]]
    assert held["what"] == "a worker of default"
    assert f"old ones in process {old} (a worker of default" in web.afar("status").stdout
    assert result(web, web.start("reads")) == "two", "others take work meanwhile"
    assert is_alive(old)
    (web.release / "go").touch()
    assert result(web, run) == ["one", "two"]
    until(lambda: not is_alive(old))
    until(lambda: web.document("status")["status"]["secrets"] == {"unread": False, "old": []})
    assert push(web)["changed"] == []
    said = (web.base / "log").read_text()
    assert OLD not in said
    assert NEW not in said


def test_without_a_roll_the_new_ones_wait_and_status_says_so(web: Web) -> None:
    keep(web, OLD)
    push(web)
    web.serve()
    assert result(web, web.start("reads")) == "one"
    keep(web, NEW)
    assert push(web, "--no-roll")["told"] is False
    assert json.loads((web.app_dir / "secrets.json").read_text()) == {"secrets": {"KEY": NEW}}
    standing = web.document("status")["status"]["secrets"]
    assert standing["unread"]
    assert [each["what"] for each in standing["old"]] == ["a worker of default"]
    assert "not handed over yet" in web.afar("status").stdout
    assert result(web, web.start("reads")) == "one"
    assert push(web)["told"] is True
    until(lambda: not web.document("status")["status"]["secrets"]["unread"])
    assert result(web, web.start("reads")) == "two"


def test_what_is_not_there_to_be_pushed_is_an_error_and_nothing_is_sent(web: Web) -> None:
    none = web.tako("secrets", "push")
    assert none.returncode == 4
    assert "tako secrets set NAME --env production" in none.stderr
    config = web.project / "tako.toml"
    config.write_text(config.read_text() + '[secrets]\nrequired = ["OTHER"]\n')
    keep(web, OLD)
    missing = web.tako("secrets", "push")
    assert missing.returncode == 3
    assert "not set for production: OTHER" in missing.stderr
    assert not (web.app_dir / "secrets.json").exists()
    assert list(web.app_dir.iterdir()) == []


# --- a release on trial ----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The file with the secrets of the release that runs."""
    rotation.put(tmp_path, {"KEY": OLD})
    return tmp_path / "secrets.json"


def of(release: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], int]:
    """What a process of that release has from the file, and which ones they are."""
    monkeypatch.setenv("TAKO_RELEASE", release)
    return stored(kept.parent), rotation.version(kept.parent)


def test_a_release_on_trial_has_the_secrets_that_it_came_with_and_the_one_that_runs_its_own(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = of("old", kept, monkeypatch)
    rotation.bring(kept.parent, "new", envelope({"KEY": NEW}))
    fresh = of("new", kept, monkeypatch)
    assert fresh[0] == {"KEY": NEW}
    assert of("old", kept, monkeypatch) == before
    rotation.settle(kept.parent, "new")
    assert of("new", kept, monkeypatch) == of("old", kept, monkeypatch) == fresh
    assert list(kept.parent.iterdir()) == [kept]


def test_what_a_release_that_was_not_taken_came_with_is_gone(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of("old", kept, monkeypatch)
    rotation.bring(kept.parent, "new", envelope({"KEY": NEW}))
    rotation.settle(kept.parent, "old")
    assert of("new", kept, monkeypatch) == of("old", kept, monkeypatch) == before
    assert list(kept.parent.iterdir()) == [kept]


def test_the_same_secrets_keep_their_time_by_which_it_is_known_who_has_others(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = of("old", kept, monkeypatch)
    rotation.bring(kept.parent, "new", envelope({"KEY": OLD}))
    assert of("new", kept, monkeypatch) == before
    rotation.settle(kept.parent, "new")
    assert of("new", kept, monkeypatch) == before


def test_secrets_that_are_put_there_in_a_trial_are_the_ones_that_stay(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotation.bring(kept.parent, "new", envelope({"KEY": NEW}))
    rotation.put(kept.parent, {"KEY": "sk_live_after_three"})
    rotation.settle(kept.parent, "new")
    assert of("new", kept, monkeypatch)[0] == {"KEY": "sk_live_after_three"}


def test_secrets_that_a_release_has_brought_and_that_are_put_there_too_are_not_lost(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power went after `current` named it, and before what it has brought was the app's."""
    rotation.bring(kept.parent, "new", envelope({"KEY": NEW}))
    monkeypatch.setenv("TAKO_RELEASE", "new")
    rotation.put(kept.parent, {"KEY": NEW})
    assert of("new", kept, monkeypatch)[0] == {"KEY": NEW}


def test_what_is_no_file_in_the_place_of_the_secrets_holds_nobody_up(kept: Path, tmp_path: Path) -> None:
    kept.unlink()
    os.mkfifo(kept)
    rotation.bring(kept.parent, "new", envelope({"KEY": NEW}))
    rotation.settle(kept.parent, "new")
    assert stored(kept.parent) == {"KEY": NEW}
