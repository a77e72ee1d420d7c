"""`tako servers`: the user's tako.toml is edited in place, and servers are asked without being changed."""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from afar import Web, deployed
from cli import document, done, make_project, tako

TOML = """\
# My shop.
name = "shop"

[envs.production]
servers = ["web-1"]  # the only one

[servers.web-1]
host = "deploy@web-1.example.com"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", "", TOML)


def test_a_server_comes_into_the_file_and_goes_and_nothing_else_of_it_changes(project: Path) -> None:
    file = project / "tako.toml"
    file.chmod(0o640)
    done("servers", "add", "web-2", "web-2.example.com", cwd=project)
    text = file.read_text()
    assert text == TOML.replace('["web-1"]', '["web-1", "web-2"]') + '\n[servers.web-2]\nhost = "web-2.example.com"\n'
    assert file.stat().st_mode & 0o777 == 0o640
    done("servers", "rm", "web-2", cwd=project)
    assert file.read_text().strip() == TOML.strip()


def test_the_first_server_of_all_and_one_of_a_new_environment(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop", "", 'name = "shop"\n')
    done("servers", "add", "web-1", "web-1", cwd=project)
    done("servers", "add", "test-1", "root@test-1", "--env", "staging", cwd=project)
    assert document("servers", "ls", cwd=project)["servers"] == [
        {"server": "web-1", "host": "web-1", "envs": ["production"]},
        {"server": "test-1", "host": "root@test-1", "envs": ["staging"]},
    ]
    assert document("servers", "rm", "test-1", cwd=project)["server"] == {"server": "test-1", "emptied": ["staging"]}
    done("servers", "rm", "web-1", cwd=project)
    assert document("servers", "ls", cwd=project)["servers"] == []
    assert (project / "tako.toml").read_text().strip() == 'name = "shop"'


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["add", "web-1", "other"], 1, "there is a server web-1 already"),
        (["add", "web-2", "-oProxyCommand=x"], 2, ""),
        (["add", "web-2", "a b"], 3, "servers.web-2.host"),
        (["add", "Web_2", "web-2"], 3, "Web_2"),
        (["rm", "web-9"], 4, "There is: web-1."),
        (["check", "--env", "nowhere"], 3, "there is no environment 'nowhere'"),
        (["check", "web-9"], 3, "It has web-1."),
        (["shell", "web-9"], 3, "It has web-1."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused_and_the_file_stays_as_it_is(
    project: Path, words: list[str], code: int, said: str
) -> None:
    ended = tako("servers", *words, cwd=project)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
    assert (project / "tako.toml").read_text() == TOML


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with deployed() as one:
        yield one


@pytest.mark.slow
def test_a_check_asks_each_server_and_says_what_speaks_against_it(web: Web) -> None:
    config = web.project / "tako.toml"
    text = config.read_text()
    config.write_text(text.replace('["web-1"]', '["web-1", "web-0"]') + '[servers.web-0]\nhost = "nowhere.invalid"\n')
    try:
        asked = web.tako("servers", "check", "--json")
        shown = web.tako("servers", "check", "web-0")
    finally:
        config.write_text(text)
    assert asked.returncode == 1, asked.stdout
    assert "servers" in asked.stdout, asked.stdout
    one, other = json.loads(asked.stdout)["servers"]
    assert one["release"] == "r1"
    assert one["python"]
    assert not other["ready"]
    assert "cannot be reached" in other["problems"][0]["problem"]
    assert shown.returncode == 1
    assert "web-0: nowhere.invalid cannot be reached" in shown.stderr
    assert "web-1" not in shown.stdout


@pytest.mark.slow
def test_a_shell_is_one_of_the_servers_with_takos_own_connection(web: Web) -> None:
    said = web.tako("servers", "shell", stdin="echo I am in $((6 * 7))\n")
    assert "I am in 42" in said.stdout


@pytest.mark.slow
def test_an_app_that_somebody_deploys_is_left_alone_and_one_that_is_not_there_is_not_found(web: Web) -> None:
    with (web.base / "deploy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write('{"user": "ada", "host": "laptop"}')
        lock.flush()
        for words in (["stop"], ["remove", "--yes"]):
            refused = web.tako("app", *words)
            assert refused.returncode == 1
            assert "web-1: a deploy of ada on laptop is under way" in refused.stderr
    assert web.release.exists()
    config = web.project / "tako.toml"
    config.write_text(config.read_text() + '[envs.staging]\nservers = ["web-1"]\n')
    missing = web.tako("app", "start", "--env", "staging")
    assert missing.returncode == 4
    assert "is not deployed there" in missing.stderr


@pytest.mark.slow
def test_nothing_is_removed_that_nobody_has_confirmed(web: Web) -> None:
    asked = web.tako("app", "remove")
    assert asked.returncode == 2
    assert f"this would remove {web.app} (production) from web-1; a copy of its store stays" in asked.stderr
    assert "its runs are lost for good" in web.tako("app", "remove", "--no-copy").stderr
    assert web.release.exists()
