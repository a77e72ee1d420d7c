"""`tako deploy` to two real servers that share a Postgres."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from deploying import Shop
from machines import machines
from postgres import NoPostgres, Server

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

    @workflow("greet")
    async def greet(payload, step):
        return await step.run("greet", here)

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
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A project with two servers and the secret of their database, which each reaches at an address of its own."""
    with machines("web", "api") as [web, api], ExitStack() as stack:
        try:
            database = Server(PORT, addresses=(web.gateway, api.gateway))
        except NoPostgres as error:
            pytest.skip(f"NO POSTGRES: {error}")
        stack.callback(database.close)
        database.admit("shop", PASSWORD, "10.231.0.0/16")
        database.ask("CREATE DATABASE shop OWNER shop")
        one = Shop(tmp_path / "shop", {"web": web, "api": api}, more=CONFIG)
        one.write("workflows/flows.py", FLOWS)
        one.database = database  # type: ignore[attr-defined]
        url = f"postgresql://shop:{PASSWORD}@{web.gateway}:{PORT},{api.gateway}:{PORT}/shop"
        kept = one.tako("secrets", "set", "DATABASE_URL", "--env", "production", stdin=url)
        assert kept.returncode == 0, kept.stderr
        yield one


def places(shop: Shop, workflow: str = "slow", count: int = 12) -> list[list[str]]:
    """Where so many runs have ended: host and release, of each."""
    code = f"""
        from workflows.flows import {workflow}
        print(*{workflow}.enqueue_many_sync([None] * {count}))
    """
    return [shop.ended(run_id) for run_id in shop.python(code).split()]


def test_it_runs_on_both(shop: Shop) -> None:
    web, api = shop.servers.values()
    results = shop.deploy()
    print(json.dumps(results, indent=1))
    release = results[0]["release"]
    for server in (web, api):
        shop.is_up(release, server)
    found = places(shop)
    print(found)
    assert {host for host, _ in found} == {"web", "api"}
