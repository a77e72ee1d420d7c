"""How SQLite finds rows: by the index that is meant for it, with work that does not grow with the rest."""

import re
from collections.abc import Iterator
from typing import Any

import apsw
import pytest

from tako_runtime.store.sqlite import Q, SqliteStore, in_bulk


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apsw.Connection]:
    """A file with many ended runs, some parked and some due, and no statistics: as plain as a server's."""
    path = tmp_path_factory.mktemp("plans") / "runs.db"
    SqliteStore(path).close()
    db = apsw.Connection(str(path))
    db.execute(
        """
        WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)
        INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, max_attempts, retries, backoff_base,
                          backoff_max, created_at, finished_at, release, payload, ready)
        SELECT printf('%08d', i), 'w' || i % 9, 'default', iif(i % 10, 'succeeded', 'pending'), 'queued', 0, i, 3, 2,
               1, 1, i, iif(i % 10, i, NULL), 'r', 'null', iif(i % 10, NULL, i % 20 = 0) FROM n;
        INSERT INTO steps (run, kind, name, position, status, attempt, started_at)
        SELECT seq, 'run', 'a', 1, 'done', 1, 1 FROM runs;
        INSERT INTO waits (signal, run, step, position, since)
        SELECT 's' || seq, seq, 'a', 1, 1 FROM runs WHERE ready = 0;
        INSERT INTO signals (name, payload, sent_at, expires_at) SELECT 'k' || seq, '1', 1, seq FROM runs;
        """
    )
    yield db
    db.close()


#: query -> the indexes it may use ("" is the table's own key), and whether it may sort what it found.
PLANS: dict[str, tuple[set[str], bool]] = {
    "promote": ({"runs_later", ""}, False),
    "claimable": ({"runs_ready", "", "sqlite_autoindex_workers_1", "sqlite_autoindex_leases_1", "json_each"}, False),
    "claim": ({"", "json_each"}, False),
    "holder_of_key": ({"runs_unique_key"}, False),
    "steps_of": ({""}, True),
    "live_runs": ({"runs_by_status"}, False),
    "finished_of": ({""}, True),
    "step": ({""}, False),
    "holds_claim": ({""}, False),
    "save_steps": ({""}, False),
    "apply": ({""}, False),
    "mark_rerun": ({""}, False),
    "mark_all_rerun": ({""}, False),
    "end_sleeps": ({""}, False),
    "drop_steps": ({""}, False),
    "drop_waits": ({"waits_by_run", "json_each"}, False),
    "answered": ({"waits_by_run"}, True),
    "drop_wait": ({"waits_by_run"}, False),
    "make_due": ({""}, False),
    "end_wait": ({""}, False),
    "take_kept": ({"signals_by_name", ""}, False),
    "drop_kept": ({"signals_by_name", ""}, False),
    "waiting_runs": ({"", "waits_by_run"}, False),
    "wake": ({""}, False),
    "expire_signals": ({"signals_by_expiry", ""}, False),
    "runs_of": ({"runs_in_hand"}, True),
    "next_ready_group": ({"runs_ready"}, False),
    "declared_is_ready": ({"runs_ready", "", "json_each"}, False),
    "first_ready": ({"runs_ready"}, False),
    "next_due": ({"runs_later"}, False),
    "next_due_run": ({"runs_later"}, False),
    "run_by_seq": ({""}, False),
    "find_runs": ({"sqlite_autoindex_runs_1"}, False),
    "list_runs": ({"sqlite_autoindex_runs_1"}, False),
    "list_runs_by_workflow": ({"runs_by_workflow"}, False),
    "list_runs_by_status": ({"runs_by_status"}, False),
    "list_succeeded": ({"sqlite_autoindex_runs_1"}, False),
    "list_runs_by_workflow_and_status": ({"runs_by_workflow"}, False),
    "attempts_of": ({""}, False),
    "waits_of": ({"waits_by_run", ""}, True),
    "list_unlucky_runs_by_workflow": ({"runs_unlucky"}, False),
    "drop_waits_from": ({"waits_by_run"}, False),
    "count_live": ({"runs_by_status"}, True),
    "delete_worker": ({"", "runs_in_hand", "sqlite_autoindex_workers_1"}, False),
    "next_ended_group": ({"runs_ended"}, False),
    "ended_runs": ({"runs_ended", ""}, False),
    "delete_runs": ({""}, False),
    "count_ended": ({"runs_ended"}, False),
    "count_dead": ({"runs_dead"}, False),
    "count_kept": ({"signals_by_expiry"}, False),
    "queues": ({"runs_ready", "runs_later"}, True),
    "ready_ahead": ({"runs_ready"}, False),
    "later_ahead": ({"runs_later"}, False),
    "in_hand": ({"runs_in_hand"}, False),
    "give_up_worker": ({"sqlite_autoindex_workers_1", ""}, False),
    "delete_steps": ({""}, False),
    "delete_attempts": ({""}, False),
    "list_schedules": ({"sqlite_autoindex_runs_1"}, False),
}
#: Walks through small tables, or ones that a LIMIT ends.
WALKS = {"all_waits", "kept_signals", "find_runs_by_end"}
#: Of a table that this store has not.
SHARED = {"await_end", "ring_for_ends", "forget_awaited"}


@pytest.mark.parametrize("name", PLANS)
def test_each_query_finds_its_rows_through_the_index_that_is_meant_for_it(filled: apsw.Connection, name: str) -> None:
    indexes, may_sort = PLANS[name]
    plan = explain(filled, name)
    used = {found[1] for line in plan if (found := re.search(r"USING (?:COVERING )?INDEX (\S+)", line))}
    used |= {"" for line in plan if "PRIMARY KEY" in line}
    assert used <= indexes, plan
    assert used, plan
    walked = [line for line in plan if re.match(r"SCAN (runs|steps|waits|w|signals|attempts)\b(?!.*USING)", line)]
    assert walked == [], plan
    if name not in ("next_due", "next_due_run", "count_live", "find_runs", "list_succeeded", "queues", "in_hand"):
        assert [line for line in plan if re.match(r"SCAN (runs|steps|waits|w|signals|attempts)\b", line)] == [], plan
    assert may_sort or not any("TEMP B-TREE" in line for line in plan), plan


def explain(db: apsw.Connection, name: str) -> list[str]:
    if columns := re.search(r"\(([^()]+)\) AS \(\{rows\}", Q[name]):
        width = columns[1].count(",") + 1
        found = db.execute("EXPLAIN QUERY PLAN " + in_bulk(name, width, 2), [1] * width * 2)
    else:
        given = {"workflows": "[]", "runs": "[]", "statuses": "[]", "since_id": "", "prefix": "0"}
        bound = dict.fromkeys(re.findall(r":(\w+)", Q[name]), 1) | given
        found = db.execute("EXPLAIN QUERY PLAN " + Q[name], bound)
    return [row[3] for row in found]


def test_every_query_that_looks_for_rows_has_its_plan_in_the_table() -> None:
    looks = {name for name, text in Q.items() if re.search(r"\b(runs|steps|waits|signals|attempts)\b.*\bWHERE\b", text)}
    assert looks - set(PLANS) - WALKS - SHARED == {"keep_signal"} & looks


@pytest.mark.parametrize(
    ("name", "bound", "most"),
    [
        ("claimable", {"workflows": '["w0"]', "group": "default", "limit": 1, "now": 9, "worker": "w"}, 500),
        ("promote", {"now": 0}, 100),
        ("next_due", {}, 100),
        ("next_ready_group", {"after": "default"}, 100),
        ("next_ended_group", {"after": ""}, 100),
        ("ended_runs", {"group": "email", "before": 10_000, "limit": 10, "after_at": 0, "after_seq": 0}, 150),
        ("declared_is_ready", {"workflows": '["0"]', "group": "default"}, 100),
        ("first_ready", {"group": "default"}, 100),
        ("list_runs", {"since_id": "", "limit": 10}, 1_000),
        ("list_runs_by_status", {"since_id": "", "limit": 10, "status": "dead"}, 1_000),
        ("live_runs", {"status": "pending", "after": "00002000", "limit": 10}, 1_000),
        ("find_runs", {"prefix": "0000123", "beyond": "0000123~", "limit": 5}, 1_000),
        ("waiting_runs", {"name": "s10", "now": 9}, 300),
        ("take_kept", {"signal": "k7", "now": 0}, 300),
        ("runs_of", {"worker": "w"}, 100),
        ("ended_runs", {"group": "default", "before": 9**9, "limit": 10, "after_at": 2000, "after_seq": 2000}, 1_000),
        ("count_dead", {"since": 0, "before": 9**9}, 100),
        ("count_kept", {"now": 4990}, 300),
        ("queues", {"now": 0}, 4_000),
        ("ready_ahead", {"group": "default", "priority": 0, "due_at": 40, "seq": 40}, 500),
        ("later_ahead", {"now": 40, "group": "default", "priority": 0, "due_at": 40, "seq": 40}, 500),
        ("in_hand", {}, 100),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_the_work_of_a_query_does_not_grow_with_what_it_does_not_concern(
    filled: apsw.Connection, name: str, bound: dict[str, Any], most: int
) -> None:
    steps = 0

    def count() -> bool:
        nonlocal steps
        steps += 1
        return False

    filled.execute("BEGIN")
    filled.set_progress_handler(count, 1)
    try:
        filled.execute(Q[name], dict.fromkeys(re.findall(r":(\w+)", Q[name])) | bound).fetchall()
    finally:
        filled.set_progress_handler(None)
        filled.execute("ROLLBACK")
    assert 0 < steps < most
