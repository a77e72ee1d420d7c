"""How things are measured: medians with their spread, ratios of pairs, fresh processes, a process's CPU and memory."""

import contextlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tako_runtime.store import Home

R = TypeVar("R")

#: Children are new interpreters: nothing of one measurement is warm for the next.
processes = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some measurements, with the least and the greatest."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a row's ratio, or on its value where it has none or the target says so."""

    relation: str  # ">=" or "<"
    bound: float
    of: str = "ratio"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.relation == ">=" else value < self.bound


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `value`, beside what it is held against, and the ratio of the two, taken pair by pair."""

    what: str
    unit: str
    value: Spread
    beside: Spread | None = None
    ratio: Spread | None = None
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        bounded = self.ratio if self.ratio and self.target.of == "ratio" else self.value
        return self.target.met(bounded.median)


def row(what: str, unit: str, values: Sequence[float], target: Target | None = None, note: str = "") -> Row:
    return Row(what, unit, Spread.of(values), target=target, note=note)


def pairs(
    what: str,
    unit: str,
    values: Sequence[float],
    beside: Sequence[float],
    target: Target | None = None,
    note: str = "",
) -> Row:
    """A row whose ratio is the median over rounds: what disturbs the machine in a round disturbs both of its halves."""
    ratios = [value / other for value, other in zip(values, beside, strict=True)]
    return Row(what, unit, Spread.of(values), Spread.of(beside), Spread.of(ratios), target, note)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# --- where and in what -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_home(copy_of: Path | None = None) -> Iterator[Home]:
    """An app of its own in a temporary folder, with no store yet, or with a copy of one that is on disk."""
    folder = Path(tempfile.mkdtemp(prefix="tako-benchmark-"))
    home = Home("bench", folder)
    try:
        if copy_of is not None:
            home.app_dir.mkdir(parents=True, mode=0o700)
            shutil.copyfile(copy_of, home.app_dir / "runs.db")
            os.sync()  # else the copy is still being written back while commits are timed
        yield home
    finally:
        shutil.rmtree(folder)


def in_fresh_process(work: Callable[..., R], *args: Any) -> R:
    """What `work(*args)` returns in a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        return pool.submit(work, *args).result()


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have used, by the kernel's clock of that process (clock_getcpuclockid)."""
    return time.clock_gettime(~pid << 3 | 2)


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def wait_until(true: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Poll, where no event can be had."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)
