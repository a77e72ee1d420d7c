"""lists: `runs ls` among 1,000,000 ended and 100,000 parked runs (--quick: a tenth), beside one among 10,000."""

import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import apsw

from benchmarks.measure import Row, Target, new_home, pairs
from tako_runtime.clock import SystemClock
from tako_runtime.control import Control
from tako_runtime.store import open_store
from tako_runtime.store.queries import migrations
from tako_runtime.store.sqlite import SqliteStore

#: Ended runs of the file that a list is held against: enough to fill its page, whatever it filters.
FEW = 10_000

#: One run in so many is parked, the others have ended.
PARKED_IN = 11

#: Ids as they would have come, one a second until now. Of the ended runs 2 in 100 are dead and 1 was cancelled, but of
#: `report` none: a list of its dead runs finds nothing. Of the parked ones one in three waits for a signal.
BUILD = """
CREATE TEMP TABLE made AS
WITH RECURSIVE n(seq) AS (SELECT 1 UNION ALL SELECT seq + 1 FROM n WHERE seq < :runs)
SELECT seq, :now - (:runs - seq) * 1000000 AS at, seq % :parked_in = 0 AS parked,
       CASE seq % 5 WHEN 0 THEN 'report' WHEN 1 THEN 'invoice' ELSE 'fulfill-order' END AS workflow,
       CASE WHEN seq % 5 = 0 THEN 'succeeded' WHEN seq % 100 IN (1, 2) THEN 'dead' WHEN seq % 100 = 3 THEN 'cancelled'
            ELSE 'succeeded' END AS ended
  FROM n;

INSERT INTO runs (seq, id, workflow, "group", status, reason, priority, due_at, attempt, max_attempts, retries,
                  backoff_base, backoff_max, claim, created_at, started_at, attempt_started_at, finished_at, release,
                  payload, result, error, ready)
SELECT seq,
       printf('%s-%s-7000-8000-%012x', substr(printf('%012x', at / 1000), 1, 8), substr(printf('%012x', at / 1000), 9),
              seq),
       workflow, 'default', iif(parked, 'pending', ended),
       iif(parked, iif(seq % 3 = 0, 'waiting', 'sleeping'), 'returned'), 0,
       iif(parked, :now + 86400000000 + seq * 1000, at), 1, 3, 2, 1000000, 3600000000, 1, at, at,
       iif(parked, at, NULL), iif(parked, NULL, at + 5000), 'dev', :payload,
       iif(parked OR ended <> 'succeeded', NULL, '{"charge":"ch_0001"}'),
       iif(NOT parked AND ended = 'dead', '{"type":"ValueError","message":"no such card"}', NULL),
       iif(parked, 0, NULL)
  FROM made ORDER BY seq;

INSERT INTO steps (run, kind, name, position, status, attempt, started_at, finished_at, result)
SELECT seq, 'run', column1, column2, 'done', 1, at, at + 1000, '1'
  FROM made, (VALUES ('a', 1), ('b', 2), ('c', 3)) ORDER BY seq, column1;

INSERT INTO steps (run, kind, name, position, status, attempt, started_at, due_at)
SELECT seq, iif(seq % 3 = 0, 'wait', 'sleep'), 'approval', 4, iif(seq % 3 = 0, 'waiting', 'sleeping'), 1, at,
       :now + 86400000000 + seq * 1000
  FROM made WHERE parked;

INSERT INTO waits (signal, run, step, position, since, deadline)
SELECT 'approval:' || seq, seq, 'approval', 4, at, :now + 86400000000 + seq * 1000 FROM made
 WHERE parked AND seq % 3 = 0;

INSERT INTO attempts (run, n, worker, started_at, finished_at, outcome)
SELECT seq, 1, 'w-1', at, at + 5000, iif(ended = 'succeeded', 'succeeded', 'failed') FROM made WHERE NOT parked;

DROP TABLE made;
"""

LISTS: dict[str, dict[str, Any]] = {
    "newest": {},
    "dead": {"statuses": ["dead"]},
    "succeeded": {"statuses": ["succeeded"]},
    "pending": {"statuses": ["pending"]},
    "dead or cancelled": {"statuses": ["dead", "cancelled"]},
    "one workflow": {"workflow": "invoice"},
    "one workflow, dead": {"workflow": "fulfill-order", "statuses": ["dead"]},
    "one workflow, dead: none": {"workflow": "report", "statuses": ["dead"]},
}


def history(ended: int) -> Path:
    """A store with so many ended runs and a tenth as many parked ones; built once, then copied."""
    folder = Path(tempfile.gettempdir()) / "tako-benchmark-history"
    folder.mkdir(exist_ok=True)
    schema = "".join(script for _, script in migrations("sqlite"))
    path = folder / f"{ended}-{zlib.crc32((schema + BUILD).encode()):08x}.db"
    if not path.exists():
        for old in folder.glob(f"{ended}-*"):  # of another schema, or half built
            old.unlink()
        half = path.with_suffix(".building")
        SqliteStore(half).close()
        db = apsw.Connection(str(half))
        db.execute("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -262144")
        now = SystemClock().now()
        runs = ended * PARKED_IN // (PARKED_IN - 1)
        with db:
            db.execute(BUILD, {"runs": runs, "now": now, "parked_in": PARKED_IN, "payload": '{"order":"2024-000123"}'})
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.close()
        half.rename(path)
    return path


def measure(quick: bool) -> list[Row]:
    return _lists(history(100_000 if quick else 1_000_000), history(FEW), 10 if quick else 25)


def _lists(full: Path, small: Path, rounds: int) -> list[Row]:
    """Each list in turns in both files, with warm caches."""
    with new_home(full) as home, new_home(small) as other:
        controls = [Control(open_store(home)), Control(open_store(other))]
        rows = []
        for what, filters in LISTS.items():
            times: list[list[float]] = [[], []]
            for _ in range(rounds):
                for control, found in zip(controls, times, strict=True):
                    began = time.perf_counter()
                    control.list_runs(**filters)
                    found.append((time.perf_counter() - began) * 1e3)
            rows.append(pairs(f"runs ls: {what}", "ms", *times, Target("<", 1.5)))
        return rows
