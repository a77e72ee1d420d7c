"""`tako deploy` before anything is sent: what is refused at once, and how that reads. No server has to be there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd as server
from cli import document, make_project, tako
from sshd import Sshd

SERVERS = 'name = "shop"\n[envs.production]\nservers = [{names}]\n{hosts}'


@pytest.fixture
def sshd() -> Iterator[Sshd]:
    with server.running() as one:
        yield one


def project(folder: Path, *names: str, more: str = "") -> Path:
    hosts = "".join(f'[servers.{name}]\nhost = "web"\n' for name in names)
    listed = ", ".join(f'"{name}"' for name in names)
    return make_project(folder / "shop", config=SERVERS.format(names=listed, hosts=hosts) + more)


def test_an_environment_that_has_no_servers_says_how_to_name_some(tmp_path: Path) -> None:
    ended = tako("deploy", cwd=make_project(tmp_path / "shop"))
    assert ended.returncode == 3
    assert "there is no environment 'production' with servers" in ended.stderr
    assert "[envs.production]" in ended.stderr


def test_a_slip_in_the_environments_name_is_told(tmp_path: Path) -> None:
    ended = tako("deploy", "--env", "prodction", cwd=project(tmp_path, "web-1"))
    assert ended.returncode == 3
    assert "Did you mean production?" in ended.stderr


def test_several_servers_with_sqlite_are_refused_before_packing_with_the_way_out(tmp_path: Path) -> None:
    shop = project(tmp_path, "web-1", "web-2")
    ended = tako("deploy", cwd=shop)
    assert ended.returncode == 1
    said = " ".join(ended.stderr.split())
    assert "2 servers cannot share one SQLite file, and not every workflow is local: ask, fail, greet, hold" in said
    assert 'url = "postgres"' in said
    assert "@workflow(NAME, local=True)" in said
    assert not (shop / ".tako" / "deploy").exists()


def test_several_servers_with_sqlite_go_on_where_every_workflow_is_local(sshd: Sshd, tmp_path: Path) -> None:
    sshd.stop()
    shop = project(tmp_path, "web-1", "web-2")
    (shop / "workflows" / "flows.py").write_text(
        "from tako_runtime import workflow\n\n@workflow('warm', local=True)\nasync def warm(step): ...\n"
    )
    ended = tako("deploy", cwd=shop, TAKO_SSH=sshd.program)
    assert "SQLite" not in ended.stderr
    assert "web-1" in ended.stdout, "it has come to asking the servers"


def test_a_required_secret_that_is_not_set_stops_it_before_packing(tmp_path: Path) -> None:
    shop = project(tmp_path, "web-1", more='[secrets]\nrequired = ["STRIPE_KEY"]\n')
    ended = tako("deploy", cwd=shop)
    assert ended.returncode == 3
    assert "required secrets that are not set for production: STRIPE_KEY" in ended.stderr
    assert "tako secrets set STRIPE_KEY --env production" in ended.stderr


def test_a_server_that_is_not_there_stops_it_with_a_table_and_nothing_changed(sshd: Sshd, tmp_path: Path) -> None:
    sshd.stop()
    shop = project(tmp_path, "web-1")
    ended = tako("deploy", cwd=shop, TAKO_SSH=sshd.program)
    assert ended.returncode == 1
    assert ended.stdout.split()[:4] == ["server", "python", "systemd", "free"]
    assert "web-1: web cannot be reached: " in ended.stderr
    assert "Nothing was changed." in ended.stderr
    assert not (shop / ".tako" / "deploy").exists()


def test_an_unknown_host_key_stops_it_with_its_fingerprint(sshd: Sshd, tmp_path: Path) -> None:
    (sshd.folder / "known").write_text("")
    ended = tako("deploy", "--json", cwd=project(tmp_path, "web-1"), TAKO_SSH=sshd.program)
    assert ended.returncode == 1
    error = json.loads(ended.stdout)["error"]
    assert sshd.fingerprint in error["message"]
    assert "log in once by hand" in error["hint"]


def test_a_rollback_asks_the_servers_first_too(sshd: Sshd, tmp_path: Path) -> None:
    sshd.stop()
    ended = tako("rollback", cwd=project(tmp_path, "web-1"), TAKO_SSH=sshd.program)
    assert ended.returncode == 1
    assert "Nothing was changed." in ended.stderr


def test_with_json_an_error_is_the_one_document(tmp_path: Path) -> None:
    error = document("deploy", "--env", "nowhere", cwd=project(tmp_path, "web-1"), code=3)["error"]
    assert "nowhere" in error["message"]
