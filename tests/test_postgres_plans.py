"""How Postgres finds rows: by the index that is meant for it, whatever it knows or believes of the tables.

What a database knows of a table it has from its last ANALYZE. A new app's tables were never looked at; and those of a
busy one were, perhaps, when all of its runs were waiting. A plan that is right only after the next one is wrong for the
minutes in which it is needed.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import psycopg.sql
import pytest
from conftest import the_server

from tako_runtime.store.database import Database
from tako_runtime.store.pipeline import array
from tako_runtime.store.postgres import PostgresStore, _columns_of, queries_of

SCHEMA = "tako_plans_production"
Q = queries_of(SCHEMA)

ENDED, PARKED, DUE, IN_HAND = 40_000, 4_000, 400, 100
TABLES = ("runs", "steps", "attempts", "waits", "signals", "workers", "leases", "schedules", "writers")

#: Runs in the order of their ends, then those that are parked, due and in hand.
FILL = f"""
INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, attempt, max_attempts, retries, backoff_base,
                  backoff_max, claim, worker, created_at, finished_at, release, payload, ready)
SELECT to_char(i, 'fm00000000'), 'w' || i % 9, 'default',
       CASE kind WHEN 'ended' THEN CASE WHEN i % 100 = 0 THEN 'dead' ELSE 'succeeded' END
                 WHEN 'in hand' THEN 'running' ELSE 'pending' END,
       CASE WHEN kind = 'parked' AND i % 2 = 0 THEN 'waiting' ELSE 'queued' END, 0, i, 1, 3, 2, 1, 1, 1,
       CASE kind WHEN 'in hand' THEN 'w-' || i % 10 END, i, CASE kind WHEN 'ended' THEN i END, 'r', 'null',
       CASE kind WHEN 'parked' THEN 0 WHEN 'due' THEN 1 END
  FROM (SELECT i, CASE WHEN i <= {ENDED} THEN 'ended' WHEN i <= {ENDED + PARKED} THEN 'parked'
                       WHEN i <= {ENDED + PARKED + DUE} THEN 'due' ELSE 'in hand' END AS kind
          FROM generate_series(1, {ENDED + PARKED + DUE + IN_HAND}) AS i) AS made;
INSERT INTO steps (run, kind, name, position, status, attempt, started_at)
SELECT seq, 'run', name, 1, 'done', 1, 1 FROM runs, (VALUES ('a'), ('b')) AS steps (name);
INSERT INTO attempts (run, n, started_at, finished_at, outcome)
SELECT seq, 1, 1, 1, 'succeeded' FROM runs WHERE finished_at IS NOT NULL;
INSERT INTO waits (signal, run, step, position, since)
SELECT 's' || seq, seq, 'a', 1, 1 FROM runs WHERE reason = 'waiting' AND status = 'pending';
INSERT INTO signals (name, payload, sent_at, expires_at)
SELECT 'k' || i, '1', 1, i FROM generate_series(1, {PARKED}) AS i;
INSERT INTO workers (id, "group", host, pid, release, started_at, lease_until)
SELECT 'w-' || i, 'default', 'h', 1, 'r', 1, 9 FROM generate_series(0, 9) AS i;
"""  # noqa: S608

#: As a young app's were, when somebody looked: all of its runs are due, and nothing has ended.
YOUNG = """
INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, max_attempts, retries, backoff_base,
                  backoff_max, created_at, release, payload, ready)
SELECT to_char(i, 'fm00000000'), 'w0', 'default', 'pending', 'queued', 0, i, 3, 2, 1, 1, i, 'r', 'null', 1
  FROM generate_series(1, 1000) AS i;
"""

KNOWN = ("nothing", "what was long ago", "what is there")


@pytest.fixture(scope="module", params=KNOWN)
def filled(request: pytest.FixtureRequest) -> "Iterator[psycopg.Connection[Any]]":
    server = the_server(request.getfixturevalue("_servers"))
    url = server.database()
    PostgresStore(Database(url, "x"), SCHEMA).close()
    with Database(url, "x").connect() as db:
        db.execute(f"SET search_path TO {SCHEMA}")
        for table in TABLES:
            db.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        if request.param == "what was long ago":
            db.execute(YOUNG)
            db.execute("ANALYZE")
            db.execute("TRUNCATE runs RESTART IDENTITY")
        db.execute(FILL)
        if request.param == "what is there":
            db.execute("ANALYZE")
        db.execute("SET search_path TO public")
        yield db
    server.drop(url)


class Plan(NamedTuple):
    indexes: set[str]
    walked: set[str]
    sorts: bool
    blocks: int


def explain(db: "psycopg.Connection[Any]", name: str, bound: dict[str, Any] | list[Any]) -> Plan:
    text, names = Q[name]
    given = [bound[name] for name in names] if isinstance(bound, dict) else bound
    kinds = ", ".join("int8" if isinstance(value, int) else "unknown" for value in given)
    db.execute(f"PREPARE it {f'({kinds})' if kinds else ''} AS {text.decode()}")  # type: ignore[arg-type]
    literals = ", ".join(
        psycopg.sql.Literal(v if not isinstance(v, bytes) else v.decode()).as_string(db) for v in given
    )
    try:
        db.execute("BEGIN")
        db.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        asked = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE it {f'({literals})' if given else ''}"
        [[[found]]] = db.execute(asked).fetchall()  # type: ignore[arg-type]
    finally:
        db.execute("ROLLBACK")
        db.execute("DEALLOCATE it")
    nodes = list(walk(found["Plan"]))
    big = {"runs", "steps", "attempts", "waits", "signals"}
    top = found["Plan"]
    return Plan(
        {node["Index Name"] for node in nodes if "Index Name" in node},
        {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"} & big,
        any("Sort" in node["Node Type"] for node in nodes),
        top["Shared Hit Blocks"] + top["Shared Read Blocks"],
    )


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for below in node.get("Plans", ()):
        yield from walk(below)


# --- what each of them may touch -------------------------------------------------------------------------------------

#: Runs that are in hand.
HAND = list(range(ENDED + PARKED + DUE + 1, ENDED + PARKED + DUE + 51))
SAVED = [(run, 1, "run", "x", 1, "done", 1, 1, 1, None, b"1", None, False) for run in HAND]

#: query -> the most blocks that it may touch, and what it is asked. What it looks for is little, of 44,500 runs.
CASES: dict[str, tuple[int, dict[str, Any] | list[Any]]] = {
    "claimable": (
        400,
        {
            "worker": "w-1",
            "now": 9,
            "group": "default",
            "workflows": array(["w0", "w1"]),
            "limit": 10,
            "pause": "pause",
        },
    ),
    "claim": (300, {"worker": "w-1", "now": 9, "runs": array(HAND[:10])}),
    "promote": (30, {"now": 0}),
    "holder_of_key": (30, {"workflow": "w0", "unique_key": "x"}),
    "steps_of": (60, {"runs": array(HAND[:10])}),
    "live_runs": (500, {"status": "pending", "after": "", "limit": 50}),
    "finished_of": (60, {"runs": array(HAND[:10])}),
    "step": (30, {"seq": 5, "kind": "run", "name": "a"}),
    "holds_claim": (30, {"seq": HAND[0], "claim": 1}),
    "save_steps": (
        800,
        _columns_of("save_steps", SAVED),
    ),
    "all of save_steps": (
        800,
        [*_columns_of("save_steps", SAVED), 50],
    ),
    "apply": (
        1500,
        _columns_of(
            "apply",
            [("succeeded", "returned", None, 1, None, None, 9, 0, 3, None, "1", None, s, 1, "running") for s in HAND],
        ),
    ),
    "insert_attempts": (500, _columns_of("insert_attempts", [(s, 1, "w", 1, 1, "succeeded", None) for s in HAND])),
    "mark_rerun": (30, {"seq": 5, "kind": "run", "name": "a"}),
    "mark_all_rerun": (30, {"seq": 5}),
    "end_sleeps": (30, {"now": 1, "seq": 5, "until": 9}),
    "drop_steps": (30, {"seq": 5, "drop_from": 1}),
    "drop_waits_from": (30, {"seq": 5, "drop_from": 1}),
    "drop_waits": (250, {"runs": array(HAND)}),
    "answered": (250, _columns_of("answered", [(s, "a") for s in HAND])),
    "make_due": (60, {"now": 1, "runs": array(HAND[:1])}),
    "take_kept": (30, {"signal": "k3000", "now": 0}),
    "end_wait": (30, {"status": "done", "now": 1, "payload": "1", "seq": ENDED + 2, "name": "a"}),
    "drop_wait": (30, {"seq": ENDED + 2, "name": "a"}),
    "waiting_runs": (30, {"name": f"s{ENDED + 2}", "now": 1}),
    "wake": (60, {"now": 1, "seq": ENDED + 2}),
    "delete_worker": (30, {"worker": "w-1"}),
    "runs_of": (30, {"worker": "w-1"}),
    "next_ended_group": (30, {"after": ""}),
    "ended_runs": (
        150,
        {
            "workflow": "w1",
            "statuses": None,
            "group": "default",
            "after_at": 2000,
            "after_seq": 2000,
            "before": 9**9,
            "limit": 10,
        },
    ),
    "delete_runs": (100, {"runs": array(list(range(1, 11)))}),
    "delete_steps": (150, {"runs": array(list(range(1, 11)))}),
    "delete_attempts": (100, {"runs": array(list(range(1, 11)))}),
    "next_ready_group": (30, {"after": ""}),
    "declared_is_ready": (30, {"group": "default", "workflows": array(["w0"])}),
    "first_ready": (30, {"group": "default"}),
    "next_due": (30, {}),
    "next_due_run": (30, {"reason": None}),
    "run_by_seq": (30, {"seq": 7}),
    "find_runs": (30, {"prefix": "0000123", "beyond": "0000124", "limit": 5}),
    "list_runs": (30, {"since_id": "", "limit": 50}),
    "list_runs_by_workflow": (100, {"workflow": "w1", "since_id": "", "limit": 50}),
    "list_runs_by_status": (500, {"status": "dead", "since_id": "", "limit": 50}),
    "list_succeeded": (400, {"since_id": "", "limit": 50}),
    "list_unlucky_runs_by_workflow": (120, {"workflow": "w1", "status": "dead", "since_id": "", "limit": 50}),
    "list_runs_by_workflow_and_status": (400, {"workflow": "w1", "status": "succeeded", "since_id": "", "limit": 50}),
    "attempts_of": (30, {"seq": 7}),
    "waits_of": (30, {"seq": ENDED + 2}),
    "all_waits": (100, {"limit": 10}),
    "kept_signals": (30, {"now": 0, "name": None, "limit": 10}),
    "drop_kept": (30, {"name": "k3000", "sent_at": 1}),
    "expire_signals": (80, {"now": 5, "limit": 10}),
    "count_live": (400, {}),
    "count_ended": (60, {"group": "default", "since": 0, "before": 500, "workflow": None, "statuses": None}),
    "count_dead": (500, {"since": 0, "before": 500}),
    "count_kept": (30, {"now": 3990}),
    "queues": (60, {"now": 0}),
    "ready_ahead": (30, {"group": "default", "priority": 0, "due_at": ENDED + PARKED + 40, "seq": ENDED + PARKED + 40}),
    "later_ahead": (
        30,
        {"now": ENDED + 40, "group": "default", "priority": 0, "due_at": ENDED + 40, "seq": ENDED + 40},
    ),
    "in_hand": (30, {}),
    "await_end": (30, {"seq": 7}),
    "ring_for_ends": (120, {"runs": array(HAND), "channel": "c", "message": "ended"}),
    "forget_awaited": (30, {}),
    "list_schedules": (30, {}),
}

#: What a person asks for, of a run that was shown: every id is looked at.
WALKS = {"find_runs_by_end", "look_over"}


def test_every_query_that_looks_for_rows_has_its_measure() -> None:
    looks = {
        name
        for name, query in Q.items()
        if re.search(rb"(FROM|UPDATE|INTO|JOIN) \S+\.(runs|steps|waits|signals|attempts)\b.*(WHERE|LIMIT)", query.text)
    }
    assert looks - set(CASES) - WALKS - {"all of apply"} == set()


@pytest.mark.parametrize("name", CASES)
def test_a_query_finds_what_it_looks_for_whatever_is_known_of_the_tables(
    filled: "psycopg.Connection[Any]", name: str
) -> None:
    most, bound = CASES[name]
    explain(filled, name, bound)  # the first look marks what was never committed
    plan = explain(filled, name, bound)
    assert plan.walked == set(), plan
    assert plan.blocks <= most, plan


def test_claims_do_not_read_again_and_again_what_was_claimed_before(filled: "psycopg.Connection[Any]") -> None:
    """Each claim leaves entries in the index that it walks, which stay until the next VACUUM: who comes by once marks
    them as dead."""
    asked = CASES["claimable"][1]
    db, before = filled, explain(filled, "claimable", asked).blocks
    db.execute(f"SET search_path TO {SCHEMA}")
    for _ in range(30):
        db.execute("UPDATE runs SET priority = 1 - priority WHERE ready = 1")
    db.execute("SET search_path TO public")
    explain(db, "claimable", asked)
    assert explain(db, "claimable", asked).blocks < 2 * before + 100
