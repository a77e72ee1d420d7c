"""From cells to results: JSON, a table in Markdown, two plots."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.measure import Spread, percentile
from benchmarks.rounds import BEST, Cell, Record, read

#: workload: (what of it, unit, digits)
SHORT = {
    "drain": ("runs per s", "runs/s"),
    "steps": ("us a step", "us a step"),
    "kill": ("ms", "ms"),
    "cold": ("ms", "ms"),
    "flushes": ("a run", "flushes a run"),
}


def line(cell: Cell, record: Record) -> str:
    """One cell for the terminal."""
    head = f"{cell.workload:8} {cell.peer:15} {cell.setting:8} {cell.concurrency or 'best':>4}"
    for why in ("absent", "missing", "failed"):
        if why in record:
            return f"{head}  {why.upper() if why != 'missing' else 'none'}: {record[why][:150]}"
    found = ", ".join(f"{name} {_value(value)}" for name, value in record["found"].items())
    return f"{head}  {found}  ({record['took']:.0f} s)"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"p50 {number(percentile(value, 0.5))} p99 {number(percentile(value, 0.99))} of {len(value)}"
    return number(value)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def write(folder: Path) -> None:
    """TODO"""
