"""From cells to results: JSON, tables in Markdown, two plots; and the table of the README.

A figure is the median over rounds, with the least and the greatest. Where there is none, the cell says why, below the
table; the best of each column is bold, the floor aside.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.measure import Spread, percentile
from benchmarks.peers import NAMES
from benchmarks.rounds import ASLEEP, BEST, WANTED, Cell, Record, read

BEGIN, END = "<!-- benchmark: made by python -m benchmarks --write -->", "<!-- /benchmark -->"

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """One column: `of` finds the number in what a cell has found. `more` is better, or less is."""

    title: str
    workload: str
    of: Callable[[Found], float]
    concurrency: int = 10
    more: bool = False
    note: Callable[[Found], str] = lambda found: ""


def _named(name: str) -> Callable[[Found], float]:
    return lambda found: float(found[name])


def _percentile(share: float) -> Callable[[Found], float]:
    return lambda found: percentile(found["ms"], share)


def _idle(found: Found) -> float:
    return float(found["CPU %"] + found.get("database's CPU %", 0))


def _asleep(found: Found) -> str:
    return "" if found["runs"] >= 10_000 else f" (of {found['runs']:,} asleep)"


def _slower(found: Found) -> float:
    """How many times as long a run takes among the ended ones."""
    before, after = (Spread.of(found[f"runs per s {when}"]).median for when in ("before", "after"))
    return before / after


def _later(found: Found) -> float:
    before, after = (percentile(found[f"ms {when}"], 0.5) for when in ("before", "after"))
    return after / before


FIGURES = (
    Figure("3-step runs/s, 10 at once", "drain", _named("runs per s"), more=True),
    Figure("at its best", "drain", _named("runs per s"), BEST, more=True),
    Figure("enqueue to first line, p50 ms", "latency", _percentile(0.5)),
    Figure("p99 ms", "latency", _percentile(0.99)),
    Figure("one of 1,000 steps, µs", "steps", _named("us a step")),
    Figure("50 steps at once, ms", "fan-out", _percentile(0.5)),
    Figure("SIGKILL to done, ms", "kill", _named("ms")),
    Figure("flushes a run", "flushes", _named("a run")),
)

#: What the README leaves to the page behind it.
MORE_FIGURES = (
    Figure("cold start, ms", "cold", _named("ms")),
    Figure("import, ms", "imports", _percentile(0.5)),
    Figure("idle CPU, % of a core", "idle", _idle),
    Figure("idle memory, MB", "idle", _named("MB")),
    Figure("enqueues/s, one by one", "enqueue", _named("one by one, per s"), more=True),
    Figure("enqueues/s, many", "enqueue", _named("many, per s"), more=True),
    Figure("10,000 sleeps: the last is late, ms", "wake", _named("the last one, ms"), ASLEEP, note=_asleep),
    Figure("among 1,000,000 ended: a drain takes", "history", _slower),
    Figure("a start takes", "history", _later),
)

#: A number that says how an engine works, not how well.
NOT_A_RACE = {"flushes a run"}


class Results:
    """What one folder of results has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        self.records = read(folder / "cells.jsonl")
        measured = {record["peer"] for record in self.records}
        self.peers = [name for name in NAMES if name in measured]

    def of(self, peer: str, workload: str, setting: str, concurrency: int) -> list[Record]:
        asked = (peer, workload, setting, concurrency)
        return [
            record
            for record in self.records
            if (record["peer"], record["workload"], record["setting"], record["concurrency"]) == asked
        ]

    def found(self, peer: str, workload: str, setting: str = "tuned", concurrency: int = 10) -> list[Found]:
        return [record["found"] for record in self.of(peer, workload, setting, concurrency) if "found" in record]

    def spread(self, peer: str, figure: Figure, setting: str = "tuned") -> Spread | None:
        values = [figure.of(found) for found in self.found(peer, figure.workload, setting, figure.concurrency)]
        return Spread.of(values) if values else None

    def note(self, peer: str, figure: Figure, setting: str) -> str:
        found = self.found(peer, figure.workload, setting, figure.concurrency)
        return figure.note(found[-1]) if found else ""

    def why_not(self, peer: str, figure: Figure, setting: str) -> str:
        """Empty where it was not asked for."""
        for record in self.of(peer, figure.workload, setting, figure.concurrency):
            for kind in ("absent", "missing", "failed"):
                if kind in record:
                    return f"FAILED: {record[kind]}" if kind == "failed" else str(record[kind])
        return ""

    def title(self, peer: str) -> str:
        return str(self.about["peers"].get(peer, {}).get("title", peer))


def write(folder: Path) -> None:
    results = Results(folder)
    (folder / "results.json").write_text(json.dumps(as_json(results), indent=1) + "\n")
    (folder / "results.md").write_text(whole(results))
    (folder / "throughput.svg").write_text(
        plots.chart(
            "3-step runs a second by one worker, by how many at once",
            {results.title(peer): _curve(results, peer) for peer in results.peers},
            ("runs at once", "runs/s"),
        )
    )
    (folder / "latency.svg").write_text(
        plots.chart(
            "From an enqueue to the first line, idle worker: the share of runs within so many ms",
            {results.title(peer): plots.shares(_latencies(results, peer)) for peer in results.peers},
            ("ms", "share"),
            logarithmic=(True, False),
        )
    )


def as_json(results: Results) -> dict[str, Any]:
    """Every figure of every peer in every setting; what each cell has found is in `cells.jsonl`."""
    figures = []
    for peer in results.peers:
        for figure in (*FIGURES, *MORE_FIGURES):
            for setting in ("tuned", "default"):
                spread, why = results.spread(peer, figure, setting), results.why_not(peer, figure, setting)
                about = {"peer": peer, "setting": setting, "figure": figure.title, "workload": figure.workload}
                if spread:
                    numbers = {"median": spread.median, "low": spread.low, "high": spread.high, "rounds": spread.n}
                    figures.append(about | numbers)
                elif why:
                    figures.append(about | {"none": why})
    return {"about": results.about, "figures": figures}


def whole(results: Results) -> str:
    """The page: every figure, both settings, the curve, who is what, and every reason."""
    parts = ["# tako beside what people would use instead", about(results)]
    for setting, title in (("tuned", "Each at its best setting"), ("default", "Each as it comes")):
        parts += (
            f"## {title}\n\n{table(results, measured, setting, spreads=True)}"
            for some in (FIGURES, MORE_FIGURES)
            if (measured := [one for one in some if any(results.spread(peer, one, setting) for peer in results.peers)])
        )
    parts.append("## Runs a second, by how many at once\n\n" + _curves(results))
    parts.append("## Who is what\n\n" + who(results))
    parts.append("![throughput](throughput.svg)\n\n![latency](latency.svg)")
    return "\n\n".join(parts) + "\n"


def brief(results: Results) -> str:
    """What the README shows, in the folder's figures."""
    place = results.folder.name
    return "\n\n".join(
        [
            about(results),
            table(results, FIGURES, "tuned"),
            ahead(results),
            f"![Runs a second by how many at once](benchmarks/results/{place}/throughput.svg)",
            f"[All figures, settings and versions](benchmarks/results/{place}/results.md)",
        ]
    )


def about(results: Results) -> str:
    facts = results.about
    lines = [
        f"Measured {results.folder.name} on {facts['machine']}; Python {facts['python']}, SQLite {facts['sqlite']}, "
        f"Postgres {facts['postgres']}; load before it {facts['load before']}. Medians of interleaved rounds."
    ]
    if facts["quick"]:
        lines.append("A quick run: one round of short measurements, no ground for a decision.")
    lines += [f"**Not measured: {name}** {why}" for name, why in facts["absent"].items()]
    return "\n".join(lines)


def table(results: Results, figures: Iterable[Figure], setting: str, spreads: bool = False) -> str:
    """Markdown; a row a peer."""
    figures = list(figures)
    best = {one.title: _best(results, one, setting) for one in figures}
    reasons: list[str] = []
    rows = ["| | " + " | ".join(one.title for one in figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for peer in results.peers:
        cells = []
        for one in figures:
            spread = results.spread(peer, one, setting)
            if spread is None:
                cells.append(_reason(results.why_not(peer, one, setting), reasons))
                continue
            text = (_spread(spread) if spreads else number(spread.median)) + results.note(peer, one, setting)
            cells.append(f"**{text}**" if peer in best[one.title] else text)
        rows.append(f"| {results.title(peer)} | " + " | ".join(cells) + " |")
    notes = [f"[{n}] {reason}." for n, reason in enumerate(reasons, 1)]
    return "\n".join(rows) + ("\n\n" + "  \n".join(notes) if notes else "")


def _reason(why: str, reasons: list[str]) -> str:
    if not why:
        return "-"
    if why not in reasons:
        reasons.append(why)
    return f"{'FAILED' if why.startswith('FAILED') else 'none'} [{reasons.index(why) + 1}]"


def _best(results: Results, figure: Figure, setting: str) -> set[str]:
    """Who has the best median, the floor aside; all who look the same are."""
    if figure.title in NOT_A_RACE:
        return set()
    found = {peer: results.spread(peer, figure, setting) for peer in results.peers if not peer.startswith("floor")}
    medians = {peer: spread.median for peer, spread in found.items() if spread}
    if not medians:
        return set()
    best = (max if figure.more else min)(medians.values())
    return {peer for peer, median in medians.items() if number(median) == number(best)}


def ahead(results: Results) -> str:
    """Where another one is better than both of tako's, in words."""
    lines = []
    for figure in (*FIGURES, *MORE_FIGURES):
        best = _best(results, figure, "tuned")
        ours = [results.spread(peer, figure) for peer in results.peers if peer.startswith("tako")]
        medians = [spread.median for spread in ours if spread]
        if best and medians and not any(peer.startswith("tako") for peer in best):
            peer = min(best)
            theirs = results.spread(peer, figure)
            assert theirs is not None
            own = (max if figure.more else min)(medians)
            said = f"{results.title(peer)} {number(theirs.median)}, tako {number(own)}"
            lines.append(f"- {_whole_title(figure)}: {said}")
    return "Where another one is ahead:\n\n" + "\n".join(lines) if lines else "tako is ahead in each of them."


def _whole_title(figure: Figure) -> str:
    """Titles lean on the column before them."""
    return {
        "at its best": "3-step runs/s at its best",
        "p99 ms": "enqueue to first line, p99 ms",
        "a start takes": "among 1,000,000 ended: a start takes, times as long",
        "among 1,000,000 ended: a drain takes": "among 1,000,000 ended: a drain takes, times as long",
    }.get(figure.title, figure.title)


def who(results: Results) -> str:
    rows = [
        "| | version | keeps its runs in | as it comes | at its best setting | best at | flushes a run |",
        "|---" * 7 + "|",
    ]
    flushes = next(one for one in FIGURES if one.title == "flushes a run")
    for peer in results.peers:
        facts = results.about["peers"].get(peer)
        if facts is None:
            continue
        found = [results.spread(peer, flushes, setting) for setting in ("default", "tuned")]
        said = " / ".join(dict.fromkeys(number(spread.median) for spread in found if spread)) or "not counted"
        settings = [facts["settings"].get(name, "-") for name in ("default", "tuned")]
        cells = [facts["title"], facts["version"], facts["store"], *settings, str(facts["best"]), said]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n\n" + CAVEATS


CAVEATS = """\
A flush is a call of fsync or fdatasync, counted by strace in the enqueuer, the worker, and the engine's server or
Postgres, while one run at a time goes from its enqueue to its end: whoever has as many as commits keeps what it
acknowledged through a loss of power. Huey and Procrastinate have no steps: their three "steps" are three calls of a
function, and what they do for a run is less. The floor is no engine at all. A cold start of tako includes its
supervisor, which starts the worker when work is due; of the others it begins when the worker's process is started,
with the server up. Who has no supervisor of its own gets a new worker at once after a SIGKILL. The idle CPU of
those on Postgres includes the database's, the memory does not. Restate's runs are sent ahead with a delay and fall
due at once, since its server tries a worker that is away less and less often. A long history is copied from 1,000
runs that the engine did itself."""


def _curve(results: Results, peer: str) -> list[tuple[float, float]]:
    best = results.about["peers"].get(peer, {}).get("best", 100)
    figure = {
        at: Figure("", "drain", _named("runs per s"), at)
        for at in sorted({one.concurrency for one in WANTED if one.workload == "drain"})
    }
    points = {at or best: results.spread(peer, one) for at, one in figure.items()}
    return [(float(at), spread.median) for at, spread in sorted(points.items()) if spread]


def _curves(results: Results) -> str:
    curves = {peer: dict(_curve(results, peer)) for peer in results.peers}
    at = sorted({x for curve in curves.values() for x in curve})
    rows = ["| | " + " | ".join(f"{x:.0f}" for x in at) + " |", "|---" * (len(at) + 1) + "|"]
    for peer, curve in curves.items():
        cells = [number(curve[x]) if x in curve else "-" for x in at]
        rows.append(f"| {results.title(peer)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _latencies(results: Results, peer: str) -> list[float]:
    return [one for found in results.found(peer, "latency") for one in found["ms"]]


def line(cell: Cell, record: Record) -> str:
    """One cell for the terminal."""
    head = (
        f"{cell.workload:8} {cell.peer:15} {cell.setting:8} {cell.concurrency if cell.concurrency > 0 else 'best':>4}"
    )
    for why in ("absent", "missing", "failed"):
        if why in record:
            return f"{head}  {'none' if why == 'missing' else why.upper()}: {record[why][:150]}"
    found = ", ".join(f"{name} {_value(value)}" for name, value in record["found"].items())
    return f"{head}  {found}  ({record['took']:.0f} s)"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"p50 {number(percentile(value, 0.5))} p99 {number(percentile(value, 0.99))} of {len(value)}"
    return number(value)


def _spread(spread: Spread) -> str:
    if spread.n == 1:
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)} to {number(spread.high)})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save_about(folder: Path, about: dict[str, Any]) -> None:
    """What a run adds to a folder that has results already is said beside what was said of those."""
    file = folder / "about.json"
    before = json.loads(file.read_text()) if file.exists() else about
    peers = before["peers"] | about["peers"]
    absent = {name: why for name, why in (before["absent"] | about["absent"]).items() if name not in about["peers"]}
    postgres = about["postgres"] if before["postgres"] == "none" else before["postgres"]
    file.write_text(json.dumps({**before, "postgres": postgres, "absent": absent, "peers": peers}, indent=1) + "\n")


def put_into(page: str, text: str) -> str:
    """The page with `text` between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
