"""`tako deploy` to two real servers that share a Postgres."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from deploying import Shop
from machines import Machine, machines
from postgres import NoPostgres, Server

from tako_runtime import store
from tako_runtime.control import Control
from tako_runtime.store import Home, version

pytestmark = pytest.mark.lasting

PORT = 5433
PASSWORD = "pg-pass-a1b2c3"  # noqa: S105 -- of a database that goes with the test

#: A worker is up on each server, so that each has its part in what is due.
CONFIG = """
    [storage]
    url = "postgres"
    [secrets]
    required = ["DATABASE_URL"]
    [workflows]
    workers = 1
    concurrency = 2
"""

FLOWS = """
    import os, socket, time

    from tako_runtime import workflow

    def here():
        return [socket.gethostname(), os.environ["TAKO_RELEASE"]]

    @workflow("slow")
    async def slow(payload, step):
        await step.run("hold", time.sleep, 0.5)
        return await step.run("where", here)

    @workflow("ask")
    async def ask(payload, step):
        first = await step.run("first", here)
        await step.wait_for("go")
        return [first, await step.run("second", here)]
"""


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[Shop, Server]]:
    """A project with two servers, and their database, which each reaches at an address of its own."""
    with machines("web", "api") as [web, api]:
        try:
            database = Server(PORT, addresses=(web.gateway, api.gateway))
        except NoPostgres as error:
            pytest.skip(f"NO POSTGRES: {error}")
        with closing(database):
            database.admit("shop", PASSWORD, "10.231.0.0/16")
            database.ask("CREATE DATABASE shop OWNER shop")
            shop = Shop(tmp_path / "shop", {"web": web, "api": api}, more=CONFIG)
            shop.write("workflows/flows.py", FLOWS)
            keep(shop, f"{web.gateway}:{PORT},{api.gateway}:{PORT}")
            yield shop, database


def keep(shop: Shop, hosts: str) -> None:
    """Have the database there from the next deploy on."""
    url = f"postgresql://shop:{PASSWORD}@{hosts}/shop"
    kept = shop.tako("secrets", "set", "DATABASE_URL", "--env", "production", stdin=url)
    assert kept.returncode == 0, kept.stderr


def places(shop: Shop, count: int = 12) -> dict[str, set[str]]:
    """Where so many runs end that all workers have to take some: the releases that they ended under, by host."""
    code = f"""
        import json
        from tako_runtime import store
        from tako_runtime.control import Control
        from workflows.flows import slow
        control = Control(store.current())
        ids = slow.enqueue_many_sync([None] * {count})
        print(json.dumps([control.wait(control.find(one))["result"] for one in ids]))
    """
    found: dict[str, set[str]] = {}
    for host, release in json.loads(shop.python(code)):
        found.setdefault(host, set()).add(release)
    return found


def test_servers_that_share_a_database_roll_over_one_after_the_other_with_both_releases_at_work_meanwhile(
    shared: tuple[Shop, Server],
) -> None:
    shop, _ = shared
    web, api = shop.servers.values()
    first = shop.release()
    assert places(shop) == {"web": {first}, "api": {first}}
    parked = shop.start("ask", api)
    until(lambda: shop.run(parked)["reason"] == "waiting")
    shop.change()
    deploying = shop.begin("deploy", "--yes")
    until(lambda: shop.current(web) != first, 120)
    second = shop.current(web)
    assert places(shop, 8) == {"web": {second}, "api": {first}}
    said, _ = deploying.communicate(timeout=120)
    assert deploying.returncode == 0, said
    for server in (web, api):
        shop.is_up(second, server)
    assert places(shop) == {"web": {second}, "api": {second}}
    shop.signal("go")
    ended = shop.ended(parked)
    assert [release for _, release in ended] == [first, second]
    assert shop.run(parked)["attempt"] == 1
    assert shop.tako("rollback", "--yes", "--parallel").returncode == 0
    assert places(shop) == {"web": {first}, "api": {first}}
    for verb, state in (("stop", "inactive"), ("start", "active")):
        done = shop.tako("app", verb, "--parallel", "--json")
        assert done.returncode == 0, done.stderr
        assert [row["state"] for row in json.loads(done.stdout)["servers"]] == [state, state]
    assert places(shop) == {"web": {first}, "api": {first}}


def sent(shop: Shop) -> list[str]:
    """All that deploys have put onto the servers."""
    folders = [f"{shop.base}/{name}" for name in ("releases", "incoming")]
    return [server.run("find", *folders, "-mindepth", "1", "-maxdepth", "1") for server in shop.servers.values()]


def test_a_shared_store_that_is_not_for_this_tako_or_cannot_be_asked_stops_a_deploy_before_anything_is_sent(
    shared: tuple[Shop, Server],
) -> None:
    shop, database = shared
    web, api = shop.servers.values()
    shop.deploy("--parallel")
    first, there = shop.current(web), sent(shop)
    url = database.url("shop")
    database.ask("CREATE TABLE kept AS SELECT version, serves FROM tako_shop_production.store", url)
    database.ask("UPDATE tako_shop_production.store SET version = 99, serves = 99", url)
    newer = f"its store is for a newer tako: it takes version 99, and this one knows {version.newest('postgres')}"
    shop.change()
    for words in (["deploy", "--yes"], ["deploy", "--dry-run"], ["deploy", "--yes", "--keep-going"]):
        refused = shop.tako(*words)
        assert refused.returncode == 1
        rows = refused.stdout.splitlines()
        assert [row.split()[0] for row in rows] == ["server", "web", "api"], "only the table"
        assert all(first in row and "its store is for a newer tako" in row for row in rows[1:])
        assert f"web: {newer}\napi: {newer}\nNothing was changed." in refused.stderr.replace("error: ", "")
        assert "Upgrade tako here." in refused.stderr
        assert "uploads" not in refused.stderr
    checked = shop.tako("servers", "check", "--json")
    assert checked.returncode == 1
    assert [one["problems"][0]["problem"] for one in json.loads(checked.stdout)["servers"]] == [newer, newer]
    assert sent(shop) == there

    back = shop.tako("rollback", first, "--yes")
    assert back.returncode == 1
    assert "for a tako that knows version 99" in back.stderr
    assert "nothing was switched" in back.stderr

    runtime = f"{shop.base}/releases/{first}/.venv/lib/python3.11/site-packages/tako_runtime/__main__.py"
    for server in (web, api):  # one that does not know the question
        server.run("sed", "-i", 's/"serves"/"of_later"/', runtime)
    later = shop.tako("deploy", "--yes")
    assert later.returncode == 1
    assert "for a tako that knows version 99" in later.stderr
    assert "nothing was switched" in later.stderr
    assert sent(shop) != there, "the new release is the one that can tell"
    for server in (web, api):
        server.run("sed", "-i", 's/"of_later"/"serves"/', runtime)
        shop.is_up(first, server)
    database.ask("UPDATE tako_shop_production.store SET (version, serves) = (SELECT version, serves FROM kept)", url)

    there = sent(shop)
    shop.change()
    keep(shop, f"{web.gateway}:1")
    away = shop.tako("deploy", "--yes")
    assert away.returncode == 1
    for server in ("web", "api"):
        assert f"{server}: the database {web.gateway}:1/shop cannot be reached" in away.stderr.replace("error: ", "")
    assert "Nothing was changed." in away.stderr
    assert PASSWORD not in away.stdout + away.stderr
    assert sent(shop) == there

    pushed = shop.tako("secrets", "push", "--no-roll")
    assert pushed.returncode == 0, pushed.stderr
    keep(shop, f"{web.gateway}:{PORT},{api.gateway}:{PORT}")
    assert shop.tako("servers", "check").returncode == 1, "what the servers have leads to nobody"
    assert [one["state"] for one in shop.deploy()] == ["taken", "taken"], "the new one is not held up by that"


def test_what_a_deploy_asks_it_asks_the_shared_store_and_a_server_that_was_down_is_made_up_for(
    shared: tuple[Shop, Server],
) -> None:
    shop, _ = shared
    web, api = shop.servers.values()
    assert [one["state"] for one in shop.deploy("--parallel")] == ["taken", "taken"]
    first = shop.current(web)
    parked = shop.start("ask", api)
    until(lambda: shop.run(parked)["reason"] == "waiting")

    shop.write("workflows/flows.py", FLOWS.replace('"first"', '"renamed"'))
    asked = shop.tako("deploy")
    assert asked.returncode == 1
    assert asked.stderr.count(f"run {parked} (ask) has finished first") == 1
    assert "web, api: run" in asked.stderr

    shop.write("workflows/flows.py", FLOWS.replace('"ask"', '"question"'))
    api.cut()
    done = shop.tako("deploy", "--yes")
    assert done.returncode == 1
    assert "api: root@api cannot be reached" in done.stderr
    assert shop.current(web) == first
    partly = shop.tako("deploy", "--yes", "--keep-going")
    assert partly.returncode == 1, "one of them has not got it"
    assert "tako deploy --resume" in partly.stderr
    second = shop.current(web)
    assert second != first, partly.stderr
    assert partly.stderr.count("orphaned: 1 (ask: 1)") == 1
    api.mend()
    until(lambda: set(places(shop)) == {"web", "api"}, 60)  # it finds its database again
    assert places(shop) == {"web": {second}, "api": {first}}
    rest = shop.deploy("--resume")
    assert [(one["server"], one["state"]) for one in rest] == [("api", "taken")]
    assert places(shop) == {"web": {second}, "api": {second}}

    shop.change()
    api.cut()
    assert shop.tako("deploy", "--yes", "--keep-going").returncode == 1
    api.mend()
    asked = shop.tako("rollback", "--yes")
    assert asked.returncode == 1
    assert f"the one that runs: web: {second}, api: {first}" in asked.stderr
    back = shop.tako("rollback", second, "--yes")
    assert back.returncode == 0, back.stderr
    assert places(shop) == {"web": {second}, "api": {second}}

    for server in (web, api):
        hidden = (
            f"! grep -rl {PASSWORD[:-1]}[{PASSWORD[-1]}] /etc /opt /run /var/log /proc/[0-9]*/environ "
            "/proc/[0-9]*/cmdline 2>/dev/null"
        )
        assert server.attempt("sh", "-c", hidden).stdout == ""
        assert PASSWORD not in server.run("journalctl", "--no-pager")


# --- what stays on each server ---------------------------------------------------------------------------------------

LOCAL = """
    @workflow("tidy", local=True)
    async def tidy(payload, step):
        first = await step.run("first", here)
        await step.wait_for("tidy")
        return [first, await step.run("second", here)]

    @workflow("ticks", local=True, schedule="* * * * * *")
    async def ticks(step):
        return here()
"""

#: The last local run of a schedule that has ended.
LAST = """
    import json
    from tako_runtime import store
    from tako_runtime.control import Control
    runs = Control(store.current(local=True)).list_runs(workflow="ticks", statuses=["succeeded"], limit=1)
    print(json.dumps(runs[0] if runs else {"id": "", "result": None}))
"""


def told(shop: Shop, *words: str) -> Any:
    done = shop.tako(*words, "--env", "production", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_each_servers_local_runs_stay_there_over_a_deploy_and_what_is_asked_of_them_all_reaches_each(
    shared: tuple[Shop, Server],
) -> None:
    shop, database = shared
    shop.write("workflows/flows.py", FLOWS + LOCAL)
    first = shop.release()
    parked = {name: shop.start("tidy", server) for name, server in shop.servers.items()}

    def shown(run: str) -> dict[str, Any]:
        return dict(told(shop, "runs", "show", run)["run"])

    for name, run in parked.items():
        until(lambda run=run: shown(run)["reason"] == "waiting")
        assert shown(run)["server"] == name
    second = shop.release()
    for name, run in parked.items():
        assert told(shop, "runs", "signal", "tidy", "--server", name)["signal"]["woken"] == 1
        until(lambda run=run: shown(run)["status"] == "succeeded")
        assert shown(run)["result"] == [[name, first], [name, second]]
        assert shown(run)["attempt"] == 1

    schedules = told(shop, "cron", "ls")["schedules"]
    assert [(one["workflow"], one["server"], one["local"]) for one in schedules] == [
        ("ticks", "web", True), ("ticks", "api", True),
    ]  # fmt: skip
    people = shop.tako("cron", "ls", "--env", "production").stdout
    assert "ticks (local, web)" in people
    assert "ticks (local, api)" in people

    refused = shop.tako("backup")
    assert refused.returncode == 1
    assert "pg_dump --format=custom" in refused.stderr
    assert "say --local" in refused.stderr
    copies = told(shop, "backup", "--local")["servers"]
    assert [one["server"] for one in copies] == ["web", "api"]
    for name, copy in zip(parked, copies, strict=True):
        kept = Control(store.open_store(Home("shop", _put(shop.folder / copy["backup"]["file"]))))
        assert kept.show(parked[name])["status"] == "succeeded"

    asked = shop.tako("runs", "prune", "--before", "1s", "--env", "production")
    assert asked.returncode == 2
    assert "on web, api" in asked.stderr
    assert told(shop, "runs", "prune", "--before", "1s", "--workflow", "tidy", "--yes")["pruned"]["runs"] == 2
    for run in parked.values():
        assert shop.tako("runs", "show", run, "--env", "production").returncode == 4

    def last(server: Machine) -> dict[str, Any]:
        return dict(json.loads(shop.python(LAST, server=server)))

    api = shop.servers["api"]
    database.stop()
    api.reboot()
    before = last(api)["id"]
    until(lambda: last(api)["id"] > before, 60)
    assert last(api)["result"] == ["api", second]
    assert shop.units(api)[second] == "active"
    said = api.run("journalctl", "--boot", "--no-pager", "--unit", f"tako-shop@{second}")
    assert "cannot be reached" in said
    assert PASSWORD not in said
    assert "Scheduled restart job" not in said
    database.start()
    until(lambda: places(shop) == {"web": {second}, "api": {second}}, 60)


def _put(copy: Path) -> Path:
    """A data folder in which that copy is the store of the app."""
    folder = copy.parent / f"{copy.stem}-data"
    (folder / "apps" / "shop").mkdir(parents=True)
    copy.rename(folder / "apps" / "shop" / "runs.db")
    return folder
