"""Retention: what goes, what stays, and that nobody waits for it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cli import make_project
from conftest import Caller, until
from workers import now, serving

from tako_runtime import clock, config, log
from tako_runtime.retention import BATCH, Retention
from tako_runtime.run import Run
from tako_runtime.state import Returned
from tako_runtime.store import Home, base
from tako_runtime.store.commit import StoreThread

TOML = """
name = "shop"
[workflows]
retention = "3d"
[workflows.email]
retention = "1h"
[servers.web]
host = "web"
[servers.web.workflows.media]
retention = "10d"
"""


@pytest.fixture
def opened_file(home: Home) -> Path:
    return home.app_dir / "runs.db"


def retention(opened: StoreThread, caller: Caller, server: str | None = None) -> Retention:
    return Retention(opened, config.parse(TOML.encode(), Path("tako.toml")), server, caller.clock)


def ended(caller: Caller, group: str = "default", *, steps: int = 1, result: str = "1") -> Run:
    """A run that ends now."""
    if group not in (worker.group for worker in caller.do(base.ListWorkers())):
        caller.join(f"w-{group}", group)
    caller.enqueue(group=group)
    [claimed] = caller.claim(worker="w-1" if group == "default" else f"w-{group}", group=group)
    for n in range(steps):
        caller.save(claimed.run, f"step-{n}", n, result=result.encode())
    assert caller.settle(claimed.run, Returned("1"))
    return claimed.run


def left(caller: Caller) -> set[str]:
    return {run.id for run in caller.do(base.ListRuns(limit=100_000))}


def test_ended_runs_go_once_they_are_older_than_their_groups_retention(caller: Caller, opened: StoreThread) -> None:
    runs = {group: ended(caller, group) for group in ("default", "email", "media", "Named.by_a-workflow")}
    here, on_web = retention(opened, caller), retention(opened, caller, "web")

    def kept_after(micros: int, which: Retention = here) -> set[str]:
        caller.clock.advance(micros)
        asyncio.run(which.prune())
        names = {run.id: group for group, run in runs.items()}
        return {names[run_id] for run_id in left(caller)}

    assert kept_after(clock.HOUR) == set(runs)
    assert kept_after(1) == set(runs) - {"email"}
    assert kept_after(3 * clock.DAY - clock.HOUR - 1) == set(runs) - {"email"}
    assert kept_after(1, on_web) == {"media"}, "a group that only a workflow names goes by [workflows]"
    assert kept_after(0) == set()


def test_a_run_goes_with_its_steps_and_attempts(caller: Caller, opened: StoreThread) -> None:
    run = ended(caller, steps=5)
    caller.clock.advance(4 * clock.DAY)
    asyncio.run(retention(opened, caller).prune())
    assert left(caller) == set()
    assert caller.do(base.Steps(seq=run.seq)) == []
    assert caller.do(base.Attempts(seq=run.seq)) == []


def test_live_runs_stay_whatever_their_age(caller: Caller, opened: StoreThread) -> None:
    running = caller.started()
    caller.save(running, "charge")
    parked = caller.started()
    caller.wait(parked, "approval")
    queued = caller.enqueue()
    later = caller.enqueue(due_at=caller.now + 3650 * clock.DAY)
    caller.clock.advance(3000 * clock.DAY)
    asyncio.run(retention(opened, caller).prune())
    assert left(caller) == {running.id, parked.id, queued, later}
    assert len(caller.do(base.Steps(seq=running.seq))) == 1


def test_kept_signals_go_once_they_have_expired_though_no_other_comes(
    caller: Caller, opened: StoreThread, opened_file: Path
) -> None:
    for n in range(BATCH + 50):
        caller.signal(f"old:{n}", keep=clock.HOUR)
    caller.signal("new", keep=clock.DAY)
    caller.clock.advance(clock.HOUR)
    with log.sink((lines := list[dict[str, Any]]()).append):
        asyncio.run(retention(opened, caller).prune())
    kept = caller.do(base.KeptSignals(now=0))
    assert [one.name for one in kept] == ["new"], "not even one that is merely hidden"
    assert [(line["runs"], line["signals"]) for line in lines if line["event"] == "store.pruned"] == [(0, BATCH + 50)]


def test_others_have_their_turn_between_batches(caller: Caller, opened: StoreThread) -> None:
    for _ in range(3 * BATCH):
        ended(caller, steps=0)
    caller.clock.advance(4 * clock.DAY)
    seen: list[int] = []

    async def both() -> None:
        pruning = asyncio.create_task(retention(opened, caller).prune())
        while not pruning.done():
            await opened.do(base.Enqueue(runs=[caller.new(group="busy")], now=caller.now))
            seen.append(sum(run.group != "busy" for run in await opened.do(base.ListRuns(limit=10_000))))

    asyncio.run(both())
    assert {3 * BATCH, 2 * BATCH, BATCH, 0} >= set(seen) >= {2 * BATCH, BATCH}


def test_a_batch_is_smaller_where_the_runs_hold_much(caller: Caller) -> None:
    for _ in range(20):
        ended(caller, result=f'"{"x" * 1_000_000}"')
    for _ in range(20):
        ended(caller, steps=3)
    caller.clock.advance(clock.SECOND)
    batches = []
    after: tuple[int, int] | None = (0, 0)
    while after is not None:
        pruned = caller.do(base.Prune(group="default", before=caller.now, limit=BATCH, after=after))
        batches.append(pruned.count)
        after = pruned.after
    assert batches == [4, 4, 4, 4, 24], "a few megabytes at a time"


def test_one_run_that_holds_more_than_a_batch_may_goes_too(caller: Caller) -> None:
    ended(caller, steps=12, result=f'"{"x" * 1_000_000}"')
    caller.clock.advance(clock.SECOND)
    assert caller.do(base.Prune(group="default", before=caller.now, limit=BATCH)).count == 1


def test_the_file_gets_smaller_by_what_was_freed(caller: Caller, opened: StoreThread, opened_file: Path) -> None:
    for _ in range(600):
        ended(caller, result=f'"{"x" * 50_000}"')
    caller.clock.advance(4 * clock.DAY)
    stays = ended(caller)

    def size() -> int:
        return opened_file.stat().st_size

    until(lambda: size() > 20_000_000)
    asyncio.run(retention(opened, caller).prune())
    assert size() < 1_000_000
    assert left(caller) == {stays.id}
    assert [step.result for step in caller.do(base.Steps(seq=stays.seq))] == [b"1"]


def test_a_server_prunes_by_itself_and_says_so(caller: Caller, home: Home, tmp_path: Path) -> None:
    caller.clock.advance(now() - caller.now - 4 * clock.DAY)
    old = ended(caller)
    caller.clock.advance(2 * clock.DAY)
    young = ended(caller)
    assert left(caller) == {old.id, young.id}
    with serving(home, make_project(tmp_path / "shop", config=TOML)) as server:
        until(lambda: server.events("store.pruned"))
        assert left(caller) == {young.id}
        assert server.events("store.pruned")[0]["runs"] == 1
