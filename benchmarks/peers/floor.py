"""The floor: the rows that tako writes, in transactions of the same sizes, by plain apsw and by plain psycopg.

No handler, no event loop, no second thread: what is left is the database, the disk, a loop in Python. The SQL stands
here in its own words, so that the ruler does not move with what it measures; the schema is tako's. It keeps nothing of
what makes an engine: no lease, no retry, no restart.
"""

import json
import socket
import subprocess
import uuid
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import apsw
import psycopg

from benchmarks.peer import Peer
from benchmarks.place import Place
from benchmarks.told import BEGAN, ENDED, tell
from benchmarks.work import FAN_OUT, Payload, body
from tako_runtime.clock import SystemClock
from tako_runtime.run import new_id
from tako_runtime.store.queries import migrations

NO_ENGINE = "rows by themselves do not sleep, wake, or come back"

INSERT = """
INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, max_attempts, retries, backoff_base,
                  backoff_max, created_at, release, payload, ready)
VALUES (?, ?, 'default', 'pending', 'queued', 0, ?, 3, 2, 1000000, 3600000000, ?, 'dev', ?, 1)"""

CLAIM = """
UPDATE runs SET status = 'running', reason = 'claimed', ready = NULL, worker = ?, claim = claim + 1,
                attempt = attempt + 1, attempt_started_at = ?, started_at = ?
 WHERE seq {found}
RETURNING seq, claim, workflow, payload"""

DUE = "SELECT seq FROM runs WHERE ready = 1 AND \"group\" = 'default' ORDER BY priority DESC, due_at, seq LIMIT ?"

Claimed = tuple[int, int, Payload]


class Floor:
    """A loop that claims, writes its rows and claims again. It hears of new work by a datagram."""

    INSERT_RUN: ClassVar[str] = INSERT
    tell, body = staticmethod(tell), staticmethod(body)

    def __init__(self, place: Place) -> None:
        self._name = f"w-{uuid.uuid4()}"
        self._now = SystemClock().now
        self._bell = place.folder / "bell"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def fill(self, workflow: str, given: Sequence[Payload]) -> None:
        now = self._now()
        with self.transaction():
            self.insert([(new_id(now), workflow, now, now, json.dumps(each)) for each in given])
        if self._bell.exists():
            self._socket.sendto(b"", str(self._bell))

    def work(self, concurrency: int) -> None:
        self._socket.bind(str(self._bell))
        while True:
            self.drain(concurrency)
            self._socket.recv(1)

    def drain(self, concurrency: int) -> None:
        """Until nothing is due. A claim travels with the ends before it, as the engine's do."""
        ended: list[Claimed] = []
        while True:
            with self.transaction():
                if ended:
                    self.end(ended)
                found = self.claim(concurrency)
            for _, _, _, given in found:
                self.tell(BEGAN, given["run"])
            for seq, claim, workflow, given in found:
                if workflow == FAN_OUT or given["steps"] > 3:
                    self._alone(seq, claim, workflow, given)
            together = [(seq, claim, given) for seq, claim, workflow, given in found if given["steps"] == 3]
            for n in range(1, 4):
                if together:
                    for _, _, given in together:
                        self.body(given, n)
                    with self.transaction():
                        self.save([(seq, claim, n) for seq, claim, _ in together])
            for _, _, _, given in found:
                self.tell(ENDED, given["run"])
            ended = [(seq, claim, given) for seq, claim, _, given in found]
            if not found:
                return

    def _alone(self, seq: int, claim: int, workflow: str, given: Payload) -> None:
        steps = [(seq, claim, n) for n in range(1, given["steps"] + 1)]
        for some in [steps] if workflow == FAN_OUT else [[one] for one in steps]:
            for _, _, n in some:
                self.body(given, n)
            with self.transaction():
                self.save(some)

    @abstractmethod
    def transaction(self) -> Any: ...

    @abstractmethod
    def insert(self, rows: list[tuple[Any, ...]]) -> None: ...

    @abstractmethod
    def claim(self, limit: int) -> list[tuple[int, int, str, Payload]]: ...

    @abstractmethod
    def save(self, steps: list[tuple[int, int, int]]) -> None: ...

    @abstractmethod
    def end(self, runs: list[Claimed]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class ByApsw(Floor):
    """A connection, set as the engine sets its own."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._db = apsw.Connection(str(place.folder / "runs.db"))
        self._db.set_busy_timeout(30_000)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "cache_size = -65536", "wal_autocheckpoint = 4000"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        if self._db.pragma("user_version") == 0:
            for number, script in migrations("sqlite"):
                self._db.execute(f"{script}; PRAGMA user_version = {number}")

    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        self._db.executemany(INSERT, rows)

    def claim(self, limit: int) -> list[tuple[int, int, str, Payload]]:
        now = self._now()
        found = self._db.execute(CLAIM.format(found=f"IN ({DUE})"), (self._name, now, now, limit)).fetchall()
        return [(seq, claim, workflow, json.loads(given)) for seq, claim, workflow, given in found]

    def save(self, steps: list[tuple[int, int, int]]) -> None:
        now = self._now()
        self._db.executemany(
            "INSERT INTO steps (run, kind, name, position, status, attempt, started_at, finished_at, result) "
            "SELECT ?1, 'run', 'step-' || ?2, ?2, 'done', 1, ?3, ?3, '1' WHERE EXISTS "
            "(SELECT 1 FROM runs WHERE seq = ?1 AND claim = ?4 AND status = 'running') ON CONFLICT DO NOTHING",
            [(seq, n, now, claim) for seq, claim, n in steps],
        )

    def end(self, runs: list[Claimed]) -> None:
        now = self._now()
        self._db.executemany(
            "UPDATE runs SET status = 'succeeded', reason = 'returned', worker = NULL, attempt_started_at = NULL, "
            "finished_at = ?, result = 'null' WHERE seq = ? AND claim = ? AND status = 'running'",
            [(now, seq, claim) for seq, claim, _ in runs],
        )
        self._db.executemany(
            "INSERT INTO attempts (run, n, worker, started_at, finished_at, outcome) "
            "VALUES (?, 1, ?, ?, ?, 'succeeded')",
            [(seq, self._name, now, now) for seq, _, _ in runs],
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        yield
        self._db.execute("COMMIT")

    def close(self) -> None:
        self._db.close()


class ByPsycopg(Floor):
    """A connection; each transaction is one round trip, by the protocol's pipeline."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._db = psycopg.connect(place.url, autocommit=True, options="-c jit=off", prepare_threshold=1)

    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        with self._db.cursor() as cursor:
            cursor.executemany(INSERT.replace("?", "%s"), rows)

    def claim(self, limit: int) -> list[tuple[int, int, str, Payload]]:
        now = self._now()
        statement = CLAIM.format(found=f"= ANY (ARRAY({DUE} FOR UPDATE SKIP LOCKED))").replace("?", "%s")
        found = self._db.execute(statement, (self._name, now, now, limit)).fetchall()
        return [(seq, claim, workflow, json.loads(given)) for seq, claim, workflow, given in found]

    def save(self, steps: list[tuple[int, int, int]]) -> None:
        now = self._now()
        seqs, claims, numbers = (list(column) for column in zip(*steps, strict=True))
        self._db.execute(
            "INSERT INTO steps (run, kind, name, position, status, attempt, started_at, finished_at, result) "
            "SELECT seq, 'run', 'step-' || n, n, 'done', 1, %s, %s, '1' "
            "FROM unnest(%s::int8[], %s::int8[], %s::int4[]) AS new (seq, claim, n) WHERE EXISTS (SELECT 1 FROM runs "
            "WHERE runs.seq = new.seq AND runs.claim = new.claim AND status = 'running') ON CONFLICT DO NOTHING",
            (now, now, seqs, claims, numbers),
        )

    def end(self, runs: list[Claimed]) -> None:
        now = self._now()
        seqs, claims = [seq for seq, _, _ in runs], [claim for _, claim, _ in runs]
        self._db.execute(
            "UPDATE runs SET status = 'succeeded', reason = 'returned', worker = NULL, attempt_started_at = NULL, "
            "finished_at = %s, result = 'null' FROM unnest(%s::int8[], %s::int8[]) AS done (seq, claim) "
            "WHERE runs.seq = done.seq AND runs.claim = done.claim AND status = 'running'",
            (now, seqs, claims),
        )
        self._db.execute(
            "INSERT INTO attempts (run, n, worker, started_at, finished_at, outcome) "
            "SELECT seq, 1, %s, %s, %s, 'succeeded' FROM unnest(%s::int8[]) AS seq",
            (self._name, now, now, seqs),
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._db.pipeline(), self._db.transaction():
            yield

    def close(self) -> None:
        self._db.close()


class FloorSqlite(Peer):
    title = "floor: plain apsw"
    module = "apsw"
    distribution = "apsw"
    settings: ClassVar = {"tuned": {}}
    said: ClassVar = {"tuned": "no engine: tako's rows, by a loop"}
    drains: ClassVar = {1: 1_000, 10: 8_000, 100: 25_000}
    missing: ClassVar = {
        **dict.fromkeys(("kill", "cold", "wake"), NO_ENGINE),
        "history": "it has tako's own tables",
    }
    floor: ClassVar[type[Floor]] = ByApsw

    def prepare(self) -> None:
        self.floor(self.place).close()

    def connect(self) -> None:
        self.own = self.floor(self.place)

    def enqueue(self, workflow: str, given: Payload) -> None:
        self.own.fill(workflow, [given])

    def enqueue_many(self, workflow: str, given: Sequence[Payload]) -> None:
        for at in range(0, len(given), 1_000):
            self.own.fill(workflow, given[at : at + 1_000])

    def worker(self) -> "subprocess.Popen[bytes]":
        return self.place.python("-m", "benchmarks.peers", "floor")

    def close(self) -> None:
        self.own.close()


class FloorPostgres(FloorSqlite):
    title = "floor: plain psycopg"
    module = "psycopg"
    distribution = "psycopg"
    store = "postgres"
    drains: ClassVar = {1: 500, 10: 3_000, 100: 10_000}
    floor = ByPsycopg

    def prepare(self) -> None:
        with psycopg.connect(self.place.url, autocommit=True) as db:
            for _, script in migrations("postgres"):
                db.execute(script)


def work() -> None:
    place = Place.of_this_process()
    kind = ByPsycopg if place.url else ByApsw
    kind(place).work(place.options["concurrency"])
