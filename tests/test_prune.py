"""An operator prunes: all that was asked for, no live run, and in nobody's way."""

import asyncio
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import Caller, finished, script

from tako_runtime import retention
from tako_runtime.clock import DAY, HOUR
from tako_runtime.control import Control
from tako_runtime.errors import InvalidValue
from tako_runtime.state import Bailed, Returned
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread


def fill(path: Path, count: int, payload: int = 100) -> None:
    """Runs that ended one microsecond after the other, each with two steps and an attempt."""
    db = apsw.Connection(str(path))
    db.execute(
        """
        BEGIN;
        WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
        INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, max_attempts, retries, backoff_base,
                          backoff_max, created_at, finished_at, release, payload)
        SELECT printf('%08d', i), 'order', 'default', 'succeeded', 'returned', 0, i, 3, 2, 1, 1, i, i, 'r',
               '"' || printf('%.*c', :payload, 'x') || '"' FROM n;
        INSERT INTO steps (run, kind, name, position, status, attempt, started_at, finished_at, result)
        SELECT seq, 'run', s.column1, 1, 'done', 1, 1, 1, '"done"' FROM runs, (VALUES ('a'), ('b')) AS s;
        INSERT INTO attempts (run, n, started_at, finished_at, outcome) SELECT seq, 1, 1, 1, 'succeeded' FROM runs;
        COMMIT;
        """,
        {"count": count, "payload": payload},
    )
    db.close()


def asked(path: Path, what: str) -> Any:
    db = apsw.Connection(str(path))
    try:
        return db.execute(what).fetchall()[0][0]
    finally:
        db.close()


@pytest.mark.slow
def test_a_prune_of_100_000_runs_lets_a_writer_in_after_every_batch_and_gives_the_space_back(
    home: Home, path: Path, opened: StoreThread
) -> None:
    fill(path, 100_000)
    before = asked(path, "PRAGMA page_count")
    writer = script(
        """
        import sys, threading
        from tako_runtime import signal_sync
        over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
        print("writing", flush=True)
        count = 0
        while not over.is_set():
            signal_sync("go")
            count += 1
        print(count)
        """,
        home=home,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    counts: list[int] = []
    assert Control(opened).prune(DAY, told=counts.append) == 100_000
    writer.stdin.write("\n")
    writer.stdin.flush()
    writes = int(finished(writer))
    assert max(counts) == retention.BATCH  # what one turn at the lock may do
    assert len(counts) >= 100_000 / retention.BATCH
    assert writes >= len(counts) / 2  # its turn came between the batches, and not once all were done
    assert opened.do_sync(base.CountKept(now=0)) == writes
    assert asked(path, "SELECT count(*) FROM runs") == 0
    assert asked(path, "SELECT (SELECT count(*) FROM steps) + (SELECT count(*) FROM attempts)") == 0
    assert asked(path, "PRAGMA freelist_count") == 0
    assert asked(path, "PRAGMA page_count") < before / 10


def test_every_batch_is_a_turn_of_its_own_in_which_nobody_is_kept_out(home: Home, path: Path) -> None:
    open_store(home).close()
    fill(path, 1_000)
    pruning, other = open_store(home), open_store(home)

    async def prune() -> list[int]:
        counts = []
        async for count in retention.prune(pruning, lambda _: DAY):
            counts.append(count)
            other.do_sync(base.SendSignal(name="go", payload="1", now=0, expires_at=DAY))
        return counts

    counts = asyncio.run(prune())
    assert counts[:5] == [retention.BATCH] * 5
    assert sum(counts) == 1_000
    assert other.do_sync(base.CountKept(now=0)) == len(counts)
    pruning.close()
    other.close()


def test_runs_with_large_values_give_all_their_space_back_however_many_pages_that_is(home: Home, path: Path) -> None:
    open_store(home).close()
    fill(path, 150, payload=100_000)
    opened = open_store(home)
    size = path.stat().st_size
    assert Control(opened).prune(DAY) == 150
    assert asked(path, "PRAGMA freelist_count") == 0
    opened.close()
    assert path.stat().st_size < size / 20


def test_prune_leaves_what_lives_and_what_ended_since(caller: Caller, opened: StoreThread) -> None:
    control = Control(opened, caller.clock)
    old, cancelled, young = caller.started(), caller.started(), caller.started()
    caller.settle(old, Returned("1"))
    caller.settle(cancelled, Bailed("enough"))
    running, queued = caller.started(), caller.enqueue()
    before = caller.clock.advance(HOUR)
    caller.settle(young, Returned("1"))
    caller.clock.advance(100 * DAY)
    assert control.prunable(before) == 2
    assert control.prunable(before, statuses=["cancelled"]) == 1
    assert control.prunable(before, workflow="pack") == 0
    assert control.prune(before, statuses=["cancelled"]) == 1
    assert control.prune(before) == 1
    assert {run["id"] for run in control.list_runs()} == {young.id, running.id, queued}


@pytest.mark.parametrize("status", ["pending", "running", "lost"])
def test_only_ends_can_be_pruned(status: str, opened: StoreThread) -> None:
    with pytest.raises(InvalidValue, match=f"{status} is no end") as refused:
        Control(opened).prune(DAY, statuses=["dead", status])
    assert "succeeded, cancelled, dead" in refused.value.hint
