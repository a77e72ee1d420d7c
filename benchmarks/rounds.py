"""What is measured in which order, and the loop that does it: cell after cell, the peers in turns.

A cell is one workload of one peer in one setting. In a round every peer has its turn at a workload before the next
workload begins, and each round begins with another peer: a noisy minute hits all of them. A cell is a process of its
own with a time limit of its own; its result is written at once, so that nothing is lost by what comes after it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer import Peer

#: A cell's concurrency that is the peer's own: where it drains quickest, and where many of its runs sleep.
BEST, ASLEEP = 0, -1

Record = dict[str, Any]


#: What a quick run does of a cell's work.
QUICK = 0.3


@dataclass(frozen=True, slots=True)
class Wanted:
    """One workload in one setting: so many rounds, and whether a quick run has it. `limit` is in seconds; `scale` is
    the share of the workload's full size.
    """

    workload: str
    setting: str = "tuned"
    concurrency: int = 10
    rounds: int = 1
    quick: bool = False
    limit: float = 90
    scale: float = 0.5


#: In this order, in each round.
WANTED = (
    Wanted("drain", rounds=3, quick=True),
    Wanted("drain", concurrency=BEST, rounds=3, quick=True),
    Wanted("latency", rounds=3, quick=True),
    Wanted("steps", rounds=3, quick=True, scale=1),
    Wanted("fan-out", rounds=2),
    Wanted("kill", rounds=3),
    Wanted("cold", rounds=2),
    Wanted("enqueue", rounds=2),
    Wanted("flushes", quick=True),
    Wanted("imports"),
    Wanted("drain", concurrency=1),
    Wanted("drain", concurrency=300),
    Wanted("idle", setting="default"),
    Wanted("idle"),
    Wanted("drain", setting="default"),
    Wanted("latency", setting="default"),
    Wanted("flushes", setting="default"),
    Wanted("wake", concurrency=ASLEEP, limit=150, scale=1),
    Wanted("history", limit=300, scale=1),
)


#: The workloads that take as long as all others together: they are measured where they are asked for.
LONG = ("wake", "history")


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement to be made. `scale` multiplies the workload's size."""

    round: int
    peer: str
    setting: str
    workload: str
    concurrency: int
    scale: float
    limit: float

    @property
    def key(self) -> tuple[int, str, str, str, int]:
        return self.round, self.peer, self.setting, self.workload, self.concurrency


def plan(peers: Sequence[str], workloads: Iterable[str], quick: bool) -> Iterator[Cell]:
    """All cells in their order. A quick run has one round, a third of the work, and what is `quick` of each workload;
    of one that has nothing of that kind, its first.
    """
    asked = [one for one in WANTED if one.workload in set(workloads)]
    firsts = {one.workload: one for one in reversed(asked)} | {one.workload: one for one in asked if one.quick}
    chosen = [one for one in asked if not quick or one.quick or one is firsts[one.workload]]
    rounds = 1 if quick else max((one.rounds for one in chosen), default=0)
    for number in range(rounds):
        turn = number % max(1, len(peers))
        for one in chosen:
            if number < (1 if quick else one.rounds):
                for peer in [*peers[turn:], *peers[:turn]]:
                    scale = one.scale * (QUICK if quick else 1)
                    yield Cell(number, peer, one.setting, one.workload, one.concurrency, scale, one.limit)


def measure(
    cells: Iterable[Cell],
    classes: dict[str, type[Peer]],
    absent: dict[str, str],
    new_database: Callable[[], contextlib.AbstractContextManager[str]],
    results: Path,
    say: Callable[[Cell, Record], None],
) -> None:
    """Append each cell's record to `results`, JSON lines; cells that have one there without a failure are not measured
    again.

    Args:
        classes: the peers that this machine has.
        absent: those it has not, with the reason.
        new_database: the url of a new Postgres database.
    """
    done = {key_of(record) for record in read(results) if "failed" not in record}
    with results.open("a") as file:
        for cell in cells:
            if cell.key in done:
                continue
            began = time.monotonic()
            record = {**asdict(cell), **_measured(cell, classes, absent, new_database)}
            record |= {"took": round(time.monotonic() - began, 2), "load": os.getloadavg()[0]}
            file.write(json.dumps(record) + "\n")
            file.flush()
            say(cell, record)


def read(results: Path) -> list[Record]:
    """The last record of each cell."""
    lines = results.read_text().splitlines() if results.exists() else []
    return list({key_of(record): record for record in map(json.loads, lines)}.values())


def key_of(record: Record) -> tuple[int, str, str, str, int]:
    return record["round"], record["peer"], record["setting"], record["workload"], record["concurrency"]


def _measured(
    cell: Cell,
    classes: dict[str, type[Peer]],
    absent: dict[str, str],
    new_database: Callable[[], contextlib.AbstractContextManager[str]],
) -> Record:
    if cell.peer in absent:
        return {"absent": absent[cell.peer]}
    cls = classes[cell.peer]
    if cell.setting not in cls.settings:
        return {"missing": "there is but one setting of it"}
    if cell.workload in cls.missing:
        return {"missing": cls.missing[cell.workload]}
    concurrency = {BEST: cls.best, ASLEEP: cls.asleep}.get(cell.concurrency, cell.concurrency)
    asked = {**asdict(cell), "concurrency": concurrency}
    with new_database() if cls.store == "postgres" else contextlib.nullcontext("") as url:
        return in_a_process([sys.executable, "-m", "benchmarks.cell"], {**asked, "url": url}, cell.limit)


def in_a_process(words: list[str], asked: Record, limit: float) -> Record:
    """What that process answers in its last line; it and all that it started are killed at the limit, in seconds."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            answer, errors = process.communicate(json.dumps(asked).encode(), timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not within {limit:g} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    try:
        found: Record = json.loads(answer.decode().strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": f"it ended with {process.returncode}", "output": errors.decode(errors="replace")[-2000:]}
    return found
