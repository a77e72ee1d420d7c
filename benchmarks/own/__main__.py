"""python -m benchmarks.own: what has no like elsewhere, or is tako's own alternative; as one table and as JSON.

A number by itself says more about the machine than about the engine; so each stands beside a floor, or beside its like,
measured in turns with it, and the ratio is the result. Targets are printed, not enforced: a benchmark is no test.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.about import machine
from benchmarks.measure import Row, Spread
from benchmarks.own import contention, drain, lists, postgres, reload, start
from benchmarks.report import number

BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module for module in (drain, contention, start, reload, lists, postgres)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller files: a minute, not ten")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well; - is stdout")
    args = parser.parse_args()
    people = sys.stderr if args.json == Path("-") else sys.stdout
    about = machine()
    print(about, file=people)
    results: dict[str, list[Row]] = {}
    for name in args.only or BENCHMARKS:
        began = time.monotonic()
        results[name] = BENCHMARKS[name].measure(args.quick)
        print("\n" + (BENCHMARKS[name].__doc__ or name).split("\n\n")[0].strip(), file=people)
        for line in table(results[name]):
            print(f"  {line}", file=people)
        print(f"  ({time.monotonic() - began:.0f} s)", file=people, flush=True)
    if args.json:
        found = {name: [{**asdict(row), "met": row.met} for row in rows] for name, rows in results.items()}
        text = json.dumps({"about": about, "quick": args.quick, "results": found}, indent=2) + "\n"
        sys.stdout.write(text) if args.json == Path("-") else args.json.write_text(text)
    return 0


HEAD = ("", "value", "", "beside it", "ratio", "target", "")


def table(rows: list[Row]) -> list[str]:
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row, one in zip([None, *rows], cells, strict=True):
        lines.append("  ".join(text.ljust(width) for text, width in zip(one, widths, strict=True)).rstrip())
        if row and row.note:
            lines.append(f"    {row.note}")
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    target = f"{row.target.relation} {row.target.bound:g}" if row.target else ""
    met = {None: "", True: "met", False: "MISSED"}[row.met]
    return row.what, _spread(row.value), row.unit, _spread(row.beside), _spread(row.ratio), target, met


def _spread(spread: Spread | None) -> str:
    """`median (low to high)`."""
    if spread is None:
        return ""
    if spread.n == 1:
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)} to {number(spread.high)})"


if __name__ == "__main__":
    sys.exit(main())
