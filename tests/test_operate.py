"""Operating an app on real servers from the laptop: its log, stop and start, secrets, a copy, and taking it down."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import tako
from conftest import until
from deploying import APP, Hammering, Shop
from machines import machines

pytestmark = pytest.mark.lasting

PORT = 8123
WITH_APP = f"""
    [app]
    command = ["python", "app.py", "{{fd}}"]
    port = {PORT}
"""


@pytest.fixture(params=["root", "deploy"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    with machines("web") as [web]:
        one = Shop(tmp_path / "shop", {"web": web}, request.param)
        one.configure(WITH_APP)
        one.write("app.py", APP)
        yield one


def told(shop: Shop, *words: str) -> Any:
    ended = shop.tako(*words, "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout)


def logged(shop: Shop, *words: str) -> list[dict[str, Any]]:
    ended = shop.tako("logs", "--json", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_an_app_is_operated_from_its_first_deploy_until_it_is_taken_down(shop: Shop, tmp_path: Path) -> None:
    release = shop.release()
    web = shop.first
    status = told(shop, "status", "--env", "production")["status"]
    assert status["supervisor"]["what"] == "supervisor"
    assert status["process"]["state"] in ("started", "healthy")
    run = told(shop, "runs", "start", "greet", "--env", "production", "--wait")["run"]
    assert run["result"] == release

    events = logged(shop, "--run", run["id"][-8:])
    assert [event["event"] for event in events][-1] == "run.succeeded"
    assert {event["run"] for event in events} == {run["id"]}
    assert {event["server"] for event in events} == {"web"}
    assert len(logged(shop, "-n", "3")) == 3

    parked = told(shop, "runs", "start", "ask", "--env", "production")["run"]["id"]
    until(lambda: shop.run(parked)["reason"] == "waiting")
    made = told(shop, "backup", "--output", str(tmp_path / "copy.db"))["backup"]
    assert made["runs"] == 2

    assert told(shop, "app", "stop")["servers"] == [
        {"server": "web", "release": release, "state": "inactive", "kept": None}
    ]
    assert set(shop.units().values()) <= {"inactive", "failed"}
    said = shop.tako("status", "--env", "production")
    assert "no supervisor runs on web" in said.stderr
    assert told(shop, "restore", str(tmp_path / "copy.db"), "--yes")["restored"]["runs"] == 2
    assert told(shop, "app", "start")["servers"][0]["state"] == "active"
    told(shop, "runs", "signal", "go", "--env", "production")
    assert shop.ended(parked) == [release, release]

    hammer = Hammering(web, PORT, 50)
    pid = told(shop, "status", "--env", "production")["status"]["process"]["pid"]
    key = {"XDG_CONFIG_HOME": str(tmp_path / "config")}  # where the shop's own commands have it too
    kept = tako("secrets", "set", "KEY", "--env", "production", cwd=shop.folder, stdin="sk_live_1", **key)
    assert kept.returncode == 0
    [pushed] = told(shop, "secrets", "push")["servers"]
    assert pushed == {"server": "web", "changed": ["KEY"], "told": True, "running": True, "error": None}
    owner = web.run("stat", "-c", "%a %U", f"{shop.data_dir}/apps/shop/secrets.json", user=shop.user).split()
    assert owner == ["600", "tako" if shop.user == "root" else shop.user]

    def renewed() -> bool:
        status = told(shop, "status", "--env", "production")["status"]
        return status["secrets"] == {"unread": False, "old": []} and status["process"]["pid"] not in (pid, None)

    until(renewed)
    supervisor = told(shop, "status", "--env", "production")["status"]["supervisor"]["pid"]
    assert told(shop, "app", "restart")["servers"][0]["state"] == "active"
    assert told(shop, "status", "--env", "production")["status"]["supervisor"]["pid"] != supervisor
    shop.runs_on(release)
    asked_for = hammer.stop()
    assert asked_for["failures"] == [], "nobody was refused, at the rotation or at the restart"
    assert set(asked_for["answers"]) == {release}

    asked = shop.tako("app", "remove")
    assert asked.returncode == 2
    assert "Say --yes." in asked.stderr
    [gone] = told(shop, "app", "remove", "--yes")["servers"]
    assert web.run("ls", gone["kept"], user=shop.user).strip() == gone["kept"]
    assert web.attempt("test", "-e", shop.base, user=shop.user).returncode == 1
    assert web.attempt("test", "-e", f"{shop.data_dir}/apps/shop", user=shop.user).returncode == 1
    assert shop.units() == {}
    missing = shop.tako("status", "--env", "production")
    assert missing.returncode == 4
    assert "shop is not deployed there" in missing.stderr
    assert shop.tako("app", "start").returncode == 4


def test_a_log_that_is_followed_goes_on_after_the_cable_was_cut_and_loses_nothing(shop: Shop) -> None:
    shop.release()
    following = shop.begin("logs", "-f", "--json")
    assert following.stdout is not None
    first = told(shop, "runs", "start", "greet", "--env", "production", "--wait")["run"]["id"]
    for line in following.stdout:
        if f'"{first}"' in line and "run.succeeded" in line:
            break
    shop.first.cut()
    for line in following.stdout:
        if "It is tried again" in line:
            break
    shop.first.mend()
    second = told(shop, "runs", "start", "greet", "--env", "production", "--wait")["run"]["id"]
    seen = []
    for line in following.stdout:
        seen.append(line)
        if f'"{second}"' in line and "run.succeeded" in line:
            break
    assert any("the connection is there again" in line for line in seen)
    events = [json.loads(line) for line in seen if line.startswith("{")]
    assert [event["event"] for event in events if event.get("run") == second][:1] == ["run.started"]
    os.killpg(following.pid, signal.SIGINT)
    following.communicate(timeout=30)
    assert following.returncode == 130


def test_the_logs_of_two_servers_are_one_in_the_order_of_time(tmp_path: Path) -> None:
    with machines("web-1", "web-2") as [one, two]:
        shop = Shop(tmp_path / "shop", {"web-1": one})
        shop.deploy()
        other = Shop(tmp_path / "other", {"web-2": two})
        other.deploy()
        text = (shop.folder / "tako.toml").read_text()
        more = '[servers.web-2]\nhost = "root@web-2"\n'
        (shop.folder / "tako.toml").write_text(text.replace('["web-1"]', '["web-1", "web-2"]') + more)
        shop.ended(shop.start("greet"))
        events = logged(shop, "--since", "1h")
        assert [name for name, _ in itertools.groupby(events, lambda event: event["server"])] == [
            "web-1", "web-2", "web-1",
        ]  # fmt: skip
        shown = shop.tako("logs", "-n", "200").stdout
        assert "web-1 worker" in shown
        assert "web-2" in shown
