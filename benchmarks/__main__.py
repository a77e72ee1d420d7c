"""python -m benchmarks: tako beside what people would use instead, on this machine, for the same work.

Every peer is measured in turns with the others, and each with a process, a folder and a database of its own. Results
are written to `benchmarks/results/<date>/` as they come; --resume goes on where a run was broken off.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import report
from benchmarks.about import about
from benchmarks.peer import Peer
from benchmarks.peers import NAMES, load
from benchmarks.place import ROOT
from benchmarks.rounds import LONG, WANTED, Cell, Record, measure, plan

if TYPE_CHECKING:
    from postgres import Server

RESULTS = ROOT / "benchmarks" / "results"
WORKLOADS = list(dict.fromkeys(one.workload for one in WANTED))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--long", action="store_true", help=f"also what takes minutes a peer: {', '.join(LONG)}")
    parser.add_argument("--quick", action="store_true", help="one round of a third of the work, the main workloads")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=list(NAMES), metavar="PEER", help=", ".join(NAMES))
    parser.add_argument("--resume", action="store_true", help="keep what the folder has, measure what it lacks")
    parser.add_argument("--results", type=Path, metavar="DIR", help="instead of benchmarks/results/<date>")
    parser.add_argument("--report", action="store_true", help="measure nothing: write the tables of what is there")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="and put the short table between that page's markers"
    )
    args = parser.parse_args()
    folder = args.results or RESULTS / (f"{today()}-quick" if args.quick else today())
    folder.mkdir(parents=True, exist_ok=True)
    cells = folder / "cells.jsonl"
    if not args.report:
        if not args.resume:
            for of_another_run in (cells, folder / "about.json"):
                of_another_run.unlink(missing_ok=True)
        short = list(dict.fromkeys(one.workload for one in WANTED if one.quick))
        whole = [one for one in WORKLOADS if one not in LONG or args.long]
        run(args.peers, args.only or (short if args.quick else whole), args.quick, cells)
    report.write(folder)
    if args.write:
        text = report.put_into(args.write.read_text("utf-8"), report.brief(report.Results(folder)))
        args.write.write_text(text, "utf-8")
    print(f"\n{folder}: results.json, results.md, throughput.svg, latency.svg")
    return 0


def today() -> str:
    return date.today().isoformat()  # noqa: DTZ011 of whoever measures


def run(peers: list[str], only: list[str], quick: bool, results: Path) -> None:
    classes: dict[str, type[Peer]] = {}
    absent: dict[str, str] = {}
    for name in peers:
        try:
            classes[name] = load(name)
        except ImportError as error:
            absent[name] = f"cannot be set up on this machine: {error}"
    with contextlib.ExitStack() as stack:
        server = None
        if any(cls.store == "postgres" for cls in classes.values()):
            try:
                server = stack.enter_context(postgres())
            except Exception as error:  # noqa: BLE001 whatever it is, the others are measured
                for name in [name for name, cls in classes.items() if cls.store == "postgres"]:
                    absent[name] = f"no Postgres can be set up on this machine: {error}"
        for name, why in absent.items():
            print(f"NOT MEASURED: {name} {why}", file=sys.stderr)
        report.save_about(results.parent, about(classes, absent, server, quick))

        @contextlib.contextmanager
        def new_database() -> Iterator[str]:
            assert server is not None
            url = server.database()
            yield url
            server.drop(url)

        todo = list(plan(peers, only, quick))
        began = time.monotonic()

        def say(cell: Cell, record: Record) -> None:
            at = todo.index(cell) + 1
            print(f"{time.monotonic() - began:5.0f} s  {at:3}/{len(todo)}  {report.line(cell, record)}", flush=True)

        measure(todo, classes, absent, new_database, results, say)


@contextlib.contextmanager
def postgres() -> "Iterator[Server]":
    """The tests' own server, but every commit is synced."""
    sys.path.append(str(ROOT / "tests"))
    from postgres import server

    with server(None, "fsync=on") as one:
        yield one


if __name__ == "__main__":
    sys.exit(main())
