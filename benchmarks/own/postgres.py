"""postgres: the same runs of three steps in a shared store, by 1, 2 and 4 workers; beside the floor: its rows by plain
psycopg, in batches of the same size, by as many processes. And beside SQLite, in the same minutes.

The server is the tests' own, with its defaults but for the number of connections: every commit is synced.
"""

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue
from typing import Any

import psycopg

from benchmarks.measure import Row, Target, in_fresh_process, new_home, pairs, processes, row
from benchmarks.own import engine
from benchmarks.own.engine import FILL, PAYLOAD
from benchmarks.own.workflows.idle_work import three_steps
from tako_runtime import store
from tako_runtime.clock import SystemClock
from tako_runtime.control import Control
from tako_runtime.run import WorkerRecord
from tako_runtime.store import Home, open_store
from tako_runtime.store.base import AddWorker, ClaimRuns, Demand
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "tests"))

#: concurrency: (runs, quick runs)
SIZES = {10: (3_000, 600), 100: (10_000, 3_000)}
WORKERS = (1, 2, 4)
NAMES = ("a", "b", "c")

CLAIM = """
UPDATE runs SET status = 'running', reason = 'claimed', ready = NULL, worker = %s, claim = claim + 1, attempt = 1,
                attempt_started_at = %s, started_at = %s
 WHERE seq = ANY (ARRAY(SELECT seq FROM runs WHERE ready = 1 AND "group" = 'default'
                         ORDER BY priority DESC, due_at, seq LIMIT %s FOR UPDATE SKIP LOCKED))
RETURNING seq, claim, id, workflow, payload"""

SAVE = """
INSERT INTO steps (run, kind, name, position, status, attempt, started_at, finished_at, result)
SELECT seq, 'run', %s, %s, 'done', 1, %s, %s, '1' FROM unnest(%s::int8[], %s::int8[]) AS new (seq, claim)
 WHERE EXISTS (SELECT 1 FROM runs WHERE runs.seq = new.seq AND runs.claim = new.claim AND status = 'running')
    ON CONFLICT DO NOTHING"""

END = """
UPDATE runs SET status = 'succeeded', reason = 'returned', worker = NULL, attempt_started_at = NULL, finished_at = %s,
                result = 'null'
  FROM unnest(%s::int8[], %s::int8[]) AS done (seq, claim)
 WHERE runs.seq = done.seq AND runs.claim = done.claim AND status = 'running'"""

ATTEMPTS = """
INSERT INTO attempts (run, n, worker, started_at, finished_at, outcome)
SELECT seq, 1, %s, %s, %s, 'succeeded' FROM unnest(%s::int8[]) AS seq"""

_now = SystemClock().now


def measure(quick: bool) -> list[Row]:
    from postgres import Server

    server = Server(None, "fsync=on")
    try:
        return [*_drains(server, quick), *_latencies(server, quick), *_history(server, quick)]
    finally:
        server.close()


# --- drain -----------------------------------------------------------------------------------------------------------


def _drains(server: Any, quick: bool) -> list[Row]:
    rows = []
    for concurrency, (many, few) in SIZES.items():
        runs, rounds = (few, 2) if quick else (many, 5)
        for workers in WORKERS:
            rates, floors = [], []
            for _ in range(rounds):
                rates.append(_in_turn(server, _drain_by_engine, runs, concurrency, workers))
                floors.append(_in_turn(server, _drain_by_psycopg, runs, concurrency, workers))
            what = f"drain, concurrency {concurrency}, {workers} worker{'s' * (workers != 1)}"
            rows.append(pairs(what, "runs/s", rates, floors, Target(">=", 0.5)))
        embedded = []
        for _ in range(rounds):
            with new_home() as home:
                embedded.append(in_fresh_process(engine.drain, home, runs, concurrency).rate)
        rows.append(row(f"drain, concurrency {concurrency}, 1 worker, SQLite", "runs/s", embedded))
    return rows


def _in_turn(server: Any, work: Callable[..., None], runs: int, concurrency: int, workers: int) -> float:
    """Runs a second, from the first worker's begin to the last one's end."""
    url = server.database()
    with new_home() as at:
        home = at._replace(url=url)
        in_fresh_process(_fill, home, runs)
        together, ended = processes.Barrier(workers), processes.Queue()
        crew = [processes.Process(target=work, args=(home, concurrency, together, ended)) for _ in range(workers)]
        for each in crew:
            each.start()
        times = [ended.get(timeout=300) for _ in crew]
        for each in crew:
            each.join()
        with _connected(home) as db:
            [(left,)] = db.execute("SELECT count(*) FROM runs WHERE finished_at IS NULL").fetchall()
        assert left == 0
    server.drop(url)
    return runs / (max(end for _, end in times) - min(begin for begin, _ in times))


def _fill(home: Home, runs: int) -> None:
    opened = open_store(home)
    store.use(opened)
    for at in range(0, runs, FILL):
        three_steps.enqueue_many_sync([PAYLOAD] * min(FILL, runs - at))
    store.use(None)
    opened.close()
    with _connected(home) as db:
        db.execute("ANALYZE")


def _drain_by_engine(home: Home, concurrency: int, together: Barrier, ended: "Queue[tuple[float, float]]") -> None:
    opened = open_store(home)
    store.use(opened)
    worker = Worker(opened, home.app_dir, registry, Settings(concurrency=concurrency, idle_timeout=0))
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    together.wait()
    began = time.monotonic()
    asyncio.run(worker.run())
    ended.put((began, time.monotonic()))
    store.use(None)
    opened.close()


def _drain_by_psycopg(home: Home, concurrency: int, together: Barrier, ended: "Queue[tuple[float, float]]") -> None:
    db, worker = _connected(home), f"w-{os.getpid()}"
    together.wait()
    began = time.monotonic()
    done: list[tuple[int, int]] = []
    while True:
        with db.pipeline():
            db.execute("BEGIN")
            now = _now()
            if done:
                seqs, claims = [seq for seq, _ in done], [claim for _, claim in done]
                db.execute(END, (now, seqs, claims))
                db.execute(ATTEMPTS, (worker, now, now, seqs))
            claimed = db.execute(CLAIM, (worker, now, now, concurrency))
            db.execute("COMMIT")
            done = [(found[0], found[1]) for found in claimed.fetchall()]
        if not done:
            break
        seqs, claims = [seq for seq, _ in done], [claim for _, claim in done]
        for position, name in enumerate(NAMES, 1):
            with db.pipeline():
                now = _now()
                db.execute("BEGIN")
                db.execute(SAVE, (name, position, now, now, seqs, claims))
                db.execute("COMMIT")
    ended.put((began, time.monotonic()))
    db.close()


def _connected(home: Home) -> "psycopg.Connection[Any]":
    options = f"-c search_path={home.schema} -c jit=off"
    return psycopg.connect(home.url, autocommit=True, options=options, prepare_threshold=1)


# --- latency ---------------------------------------------------------------------------------------------------------


def _latencies(server: Any, quick: bool) -> list[Row]:
    """From the call of `enqueue` to the end of the run, seen by who enqueued it; the worker is at rest before each."""
    url, times = server.database(), []
    for kind in (url, store.EMBEDDED):
        with new_home() as at:
            home = at._replace(url=kind)
            times.append(in_fresh_process(_round_trips, home, 50 if quick else 400))
    server.drop(url)
    return [pairs("from enqueue to the end of a run, beside SQLite", "ms", *times)]


def _round_trips(home: Home, count: int) -> list[float]:
    opened = open_store(home)
    store.use(opened)
    words = [sys.executable, "-m", "tako_runtime", "worker", "--dir", "workflows"]
    worker = subprocess.Popen(
        words, cwd=HERE, env={**os.environ, **home.environment(), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    control, times = Control(opened, app_dir=home.app_dir), []
    for _ in range(count + 10):
        began = time.perf_counter()
        run_id = three_steps.enqueue_sync(PAYLOAD)
        control.wait(control.find(run_id))
        times.append((time.perf_counter() - began) * 1e3)
    worker.terminate()
    worker.wait()
    store.use(None)
    opened.close()
    return times[10:]


# --- many runs -------------------------------------------------------------------------------------------------------

ENDED = """
INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, attempt, max_attempts, retries, backoff_base,
                  backoff_max, claim, created_at, finished_at, release, payload, result)
SELECT 'e' || n, 'three-steps', 'default', 'succeeded', 'returned', 0, n, 1, 3, 2, 1, 1, 1, n, n, 'r', '1', '1'
  FROM generate_series(1, %s) AS n"""

PARKED = """
INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, attempt, max_attempts, retries, backoff_base,
                  backoff_max, claim, created_at, release, payload, ready)
SELECT 'p' || n, 'three-steps', 'default', 'pending', 'sleeping', 0, 9000000000000000 + n, 1, 3, 2, 1, 1, 1, n, 'r',
       '1', 0
  FROM generate_series(1, %s) AS n"""


def _history(server: Any, quick: bool) -> list[Row]:
    """A claim of ten runs, and the look for what is due, among many that ended and many that are parked; beside those
    in a store without them, in turns. Nobody has analysed the tables since they were filled."""
    ended, parked = (100_000, 10_000) if quick else (1_000_000, 100_000)
    among = f"among {ended:,} ended and {parked:,} parked runs"
    claims, looks = in_fresh_process(_among_many, server.database(), server.database(), ended, parked)
    return [
        pairs(f"a claim of 10 {among}", "ms", *claims, Target("<", 2)),
        pairs(f"when the next run is due, {among}", "ms", *looks, Target("<", 2)),
    ]


def _among_many(full: str, empty: str, ended: int, parked: int) -> tuple[list[list[float]], list[list[float]]]:
    """Claims and looks, in milliseconds: each in the full store, and in the empty one."""
    with new_home() as at, new_home() as beside:
        homes = [at._replace(url=full), beside._replace(url=empty)]
        stores = [open_store(home) for home in homes]
        with _connected(homes[0]) as db:
            db.execute("SET synchronous_commit = off")
            db.execute(ENDED, (ended,))
            db.execute(PARKED, (parked,))
        now = _now()
        for opened in stores:
            store.use(opened)
            for _ in range(2):
                three_steps.enqueue_many_sync([PAYLOAD] * FILL)
            record = WorkerRecord("w", "default", "h", 1, "r", now, now + 1_000_000_000)
            opened.do_sync(AddWorker(worker=record))
        claims: list[list[float]] = [[], []]
        looks: list[list[float]] = [[], []]
        for _ in range(150):
            for opened, claimed, looked in zip(stores, claims, looks, strict=True):
                claim = ClaimRuns(worker="w", group="default", workflows=["three-steps"], limit=10, now=_now())
                began = time.perf_counter()
                assert len(opened.do_sync(claim)) == 10
                between = time.perf_counter()
                assert opened.do_sync(Demand(now=_now())).groups == {"default"}
                claimed.append((between - began) * 1e3)
                looked.append((time.perf_counter() - between) * 1e3)
        store.use(None)
        for opened in stores:
            opened.close()
        return [times[20:] for times in claims], [times[20:] for times in looks]
