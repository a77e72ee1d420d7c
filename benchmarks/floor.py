"""The floor: the rows that the engine writes, written by plain apsw in transactions of the same sizes.

No handler, no event loop, no second thread: what is left is SQLite, the disk, and a loop in Python. The SQL stands here
in its own words, so that the ruler does not move with what it measures; the schema is the engine's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from uuid import uuid4

import apsw
import msgspec

from benchmarks.engine import FILL, PAYLOAD, Drained
from benchmarks.workflows.idle_work import NAMES
from tako_runtime.clock import SystemClock
from tako_runtime.run import new_id
from tako_runtime.store import Home
from tako_runtime.store.queries import migrations

INSERT_RUN = """
INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, max_attempts, retries, backoff_base,
                  backoff_max, created_at, release, payload, ready)
VALUES (?, ?, 'default', 'pending', 'queued', 0, ?, 3, 2, 1000000, 3600000000, ?, 'dev', ?, 1)"""

CLAIM = """
UPDATE runs SET status = 'running', reason = 'claimed', ready = NULL, worker = ?, claim = claim + 1,
                attempt = attempt + 1, attempt_started_at = ?, started_at = ?
 WHERE seq IN (SELECT seq FROM runs WHERE ready = 1 AND "group" = 'default' ORDER BY priority DESC, due_at, seq LIMIT ?)
RETURNING seq, claim, id, workflow, payload"""

SAVE_STEP = """
INSERT INTO steps (run, kind, name, position, status, attempt, started_at, finished_at, result)
SELECT ?1, 'run', ?2, ?3, 'done', 1, ?4, ?4, '1'
 WHERE EXISTS (SELECT 1 FROM runs WHERE seq = ?1 AND claim = ?5 AND status = 'running') ON CONFLICT DO NOTHING"""

END = """
UPDATE runs SET status = 'succeeded', reason = 'returned', worker = NULL, attempt_started_at = NULL, finished_at = ?,
                result = 'null'
 WHERE seq = ? AND claim = ? AND status = 'running'"""

INSERT_ATTEMPT = """
INSERT INTO attempts (run, n, worker, started_at, finished_at, outcome) VALUES (?, 1, ?, ?, ?, 'succeeded')"""

_now = SystemClock().now


class Floor:
    """A connection, set as the engine sets its own."""

    def __init__(self, home: Home) -> None:
        home.app_dir.mkdir(parents=True, exist_ok=True)
        self._db = apsw.Connection(str(home.app_dir / "runs.db"))
        self._worker = f"w-{uuid4()}"
        self.commits = 0
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "cache_size = -65536", "wal_autocheckpoint = 4000"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        if self._db.pragma("user_version") == 0:
            for number, script in migrations("sqlite"):
                self._db.execute(f"{script}; PRAGMA user_version = {number}")

    def fill(self, runs: int) -> None:
        payload = msgspec.json.encode(PAYLOAD).decode()
        for at in range(0, runs, FILL):
            now = _now()
            with self._transaction():
                rows = [(new_id(now), "three-steps", now, now, payload) for _ in range(min(FILL, runs - at))]
                self._db.executemany(INSERT_RUN, rows)

    def drain(self, concurrency: int) -> None:
        """A claim travels with the ends before it, as the engine's do."""
        ended: list[tuple[int, int]] = []
        while True:
            with self._transaction():
                if ended:
                    self._end(ended)
                ended = self._claim(concurrency)
            if not ended:
                return
            for position, name in enumerate(NAMES, 1):
                self.save_step(ended, name, position)

    def long_run(self, steps: int) -> None:
        with self._transaction():
            claimed = self._claim(10)
        for n in range(steps):
            self.save_step(claimed, f"step {n}", n + 1)
        with self._transaction():
            self._end(claimed)

    def save_step(self, runs: list[tuple[int, int]], name: str, position: int) -> None:
        with self._transaction():
            now = _now()
            self._db.executemany(SAVE_STEP, [(seq, name, position, now, claim) for seq, claim in runs])

    def claim(self, limit: int) -> None:
        with self._transaction():
            self._claim(limit)

    def _claim(self, limit: int) -> list[tuple[int, int]]:
        now = _now()
        return [(row[0], row[1]) for row in self._db.execute(CLAIM, (self._worker, now, now, limit)).fetchall()]

    def _end(self, runs: list[tuple[int, int]]) -> None:
        now = _now()
        self._db.executemany(END, [(now, seq, claim) for seq, claim in runs])
        self._db.executemany(INSERT_ATTEMPT, [(seq, self._worker, now, now) for seq, _ in runs])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        yield
        self._db.execute("COMMIT")
        self.commits += 1

    def close(self) -> None:
        self._db.close()


def drain(home: Home, runs: int, concurrency: int) -> Drained:
    floor = Floor(home)
    floor.fill(runs)
    return _timed(floor, runs, lambda: floor.drain(concurrency))


def one_long_run(home: Home, steps: int) -> Drained:
    floor = Floor(home)
    floor.fill(1)
    return _timed(floor, 1, lambda: floor.long_run(steps))


def start_when_rung(home: Home, bell: Connection) -> None:
    """Claim a run at each message, and send back when that was on disk."""
    floor = Floor(home)
    bell.send(None)
    while bell.recv():
        floor.claim(10)
        bell.send(time.monotonic_ns())
    floor.close()


def _timed(floor: Floor, runs: int, work: Callable[[], None]) -> Drained:
    commits, cpu, began = floor.commits, time.process_time(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    floor.close()
    return Drained(runs, seconds, floor.commits - commits, cpu)
