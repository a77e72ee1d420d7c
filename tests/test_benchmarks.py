"""The benchmark's own code: who has a turn when, what becomes of a cell that fails, and what the tables say."""

import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, report, rounds
from benchmarks.flushes import total
from benchmarks.measure import Spread, percentile
from benchmarks.multiply import in_sqlite
from benchmarks.peer import Peer
from benchmarks.rounds import Cell, in_a_process, measure, plan, read
from benchmarks.told import BEGAN, ENDED, VARIABLE, Told

ROOT = Path(__file__).parent.parent
PEERS = ["one", "two", "three"]


class Engine(Peer):
    title, store = "An engine", "sqlite"
    missing = {"steps": "it has no steps"}


def cell(peer: str = "one", workload: str = "drain", number: int = 0) -> Cell:
    return Cell(number, peer, "tuned", workload, 10, 1.0, 5)


def record(peer: str, workload: str, found: dict[str, Any], number: int = 0, concurrency: int = 10) -> str:
    about = {"round": number, "peer": peer, "setting": "tuned", "workload": workload, "concurrency": concurrency}
    return json.dumps({**about, "found": found, "took": 1.0}) + "\n"


def test_every_peer_has_its_turn_at_a_workload_before_the_next_one_begins_and_rounds_begin_with_another() -> None:
    cells = list(plan(PEERS, ["drain"], quick=False))
    first = [one.peer for one in cells if one.round == 0 and one.concurrency == 10 and one.setting == "tuned"]
    second = [one.peer for one in cells if one.round == 1 and one.concurrency == 10 and one.setting == "tuned"]
    assert first == PEERS
    assert second == ["two", "three", "one"]
    for at in range(0, len(cells), len(PEERS)):
        turn = cells[at : at + len(PEERS)]
        assert {one.peer for one in turn} == set(PEERS)
        assert len({(one.round, one.workload, one.setting, one.concurrency) for one in turn}) == 1


def test_no_cell_is_planned_twice() -> None:
    keys = [one.key for one in plan(PEERS, [one.workload for one in rounds.WANTED], quick=False)]
    assert len(keys) == len(set(keys))


def test_a_quick_run_has_one_round_and_less_to_do() -> None:
    workloads = [one.workload for one in rounds.WANTED if one.quick]
    quick, whole = list(plan(PEERS, workloads, quick=True)), list(plan(PEERS, workloads, quick=False))
    assert {one.round for one in quick} == {0}
    assert len(quick) < len(whole) / 2
    scales = {one.key: one.scale for one in whole}
    assert all(one.scale < scales[one.key] for one in quick)
    assert len(list(plan(PEERS, ["idle"], quick=True))) == len(PEERS)  # asked for, it is measured


def test_a_cell_that_hangs_is_killed_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    found = in_a_process([sys.executable, "-c", code], {}, 3)
    assert found == {"failed": "not within 3 s"}
    deadline = time.monotonic() + 30
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.02)


def test_a_cell_that_ends_without_an_answer_is_a_failure_with_what_it_said() -> None:
    found = in_a_process([sys.executable, "-c", "import sys; sys.exit('no such table')"], {}, 30)
    assert found["failed"] == "it ended with 1"
    assert "no such table" in found["output"]


def test_a_failure_loses_nobody_elses_results_and_who_is_absent_or_lacks_a_thing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(words: list[str], asked: dict[str, Any], limit: float) -> dict[str, Any]:
        return {"failed": "it broke"} if asked["peer"] == "two" else {"found": {"runs per s": 7.0}}

    monkeypatch.setattr(rounds, "in_a_process", answer)
    cells = [cell("one"), cell("two"), cell("three"), cell("three", "steps"), cell("gone")]
    classes: dict[str, type[Peer]] = dict.fromkeys(PEERS, Engine)
    said: list[str] = []
    path = tmp_path / "cells.jsonl"
    measure(
        cells, classes, {"gone": "no wheel"}, lambda: nullcontext(""), path,
        lambda cell, record: said.append(report.line(cell, record)),
    )  # fmt: skip
    one, two, three, steps, gone = read(path)
    assert (one["found"], three["found"]) == ({"runs per s": 7.0}, {"runs per s": 7.0})
    assert two["failed"] == "it broke"
    assert steps["missing"] == "it has no steps"
    assert gone["absent"] == "no wheel"
    assert "FAILED: it broke" in said[1]
    assert "ABSENT: no wheel" in said[4]


def test_going_on_measures_what_is_not_there_and_what_failed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(words: list[str], what: dict[str, Any], limit: float) -> dict[str, Any]:
        asked.append(what["peer"])
        return {"failed": "it broke"} if len(asked) == 2 else {"found": {"runs per s": 1.0}}

    monkeypatch.setattr(rounds, "in_a_process", answer)
    classes: dict[str, type[Peer]] = dict.fromkeys(PEERS, Engine)
    path = tmp_path / "cells.jsonl"
    for cells in ([cell("one"), cell("two")], [cell("one"), cell("two"), cell("three")]):
        measure(cells, classes, {}, lambda: nullcontext(""), path, lambda cell, record: None)
    assert asked == ["one", "two", "two", "three"]
    assert all("found" in one for one in read(path))


@pytest.fixture
def results(tmp_path: Path) -> report.Results:
    """Two engines and a floor, three rounds of one drain; one latency; one engine has no steps."""
    (tmp_path / "cells.jsonl").write_text(
        "".join(
            record(peer, "drain", {"runs per s": rate + number}, number)
            for number in (0, 1, 2)
            for peer, rate in (("tako-sqlite", 5000.0), ("restate", 900.0), ("floor-sqlite", 9000.0))
        )
        + record("tako-sqlite", "latency", {"ms": [3.0, 1.0, 2.0]})
        + record("restate", "latency", {"ms": [0.5, 0.6, 0.7]})
        + json.dumps({**json.loads(record("restate", "steps", {})), "missing": "it has no steps"}).replace(
            '"found": {}, ', ""
        )
        + "\n"
        + json.dumps({**json.loads(record("restate", "kill", {})), "failed": "it hung"}).replace('"found": {}, ', "")
        + "\n"
        + record("tako-sqlite", "kill", {"ms": 250.0})
    )
    peer = {"store": "sqlite", "settings": {"tuned": "as quick as it gets"}, "best": 100}
    titles = {"tako-sqlite": "tako", "restate": "Other | 2", "floor-sqlite": "floor"}
    report.save_about(
        tmp_path,
        {
            "machine": "m", "load before": "0", "python": "3", "sqlite": "3", "postgres": "none", "quick": False,
            "absent": {"third": "cannot be set up on this machine: no wheel"},
            "peers": {name: {"title": title, "version": "1", **peer} for name, title in titles.items()},
        },
    )  # fmt: skip
    return report.Results(tmp_path)


def test_what_is_measured_later_is_told_of_beside_what_was_before(results: report.Results) -> None:
    later = {**results.about, "machine": "another", "postgres": "16", "absent": {}}
    third = {"third": {**later["peers"]["restate"], "title": "Third"}}
    report.save_about(results.folder, {**later, "peers": third})
    about = report.Results(results.folder).about
    assert list(about["peers"]) == ["tako-sqlite", "restate", "floor-sqlite", "third"]
    assert (about["machine"], about["postgres"], about["absent"]) == ("m", "16", {})


def test_a_table_has_the_medians_and_the_best_one_is_bold_the_floor_aside(results: report.Results) -> None:
    lines = report.table(results, report.FIGURES[:1], "tuned", spreads=True).splitlines()
    assert lines[2] == "| tako | **5,001 (5,000 to 5,002)** |"
    assert lines[3] == "| Other | 2 | 901 (900 to 902) |"
    assert lines[4] == "| floor | 9,001 (9,000 to 9,002) |"


def test_a_cell_without_a_number_says_why_below(results: report.Results) -> None:
    [steps] = [one for one in report.FIGURES if one.workload == "steps"]
    [kill] = [one for one in report.FIGURES if one.workload == "kill"]
    text = report.table(results, [steps, kill], "tuned")
    assert "| Other | 2 | none [1] | FAILED [2] |" in text
    assert "[1] it has no steps." in text
    assert "[2] FAILED: it hung." in text


def test_it_says_where_another_one_is_ahead_and_who_was_not_measured(results: report.Results) -> None:
    brief = report.brief(results)
    assert "- enqueue to first line, p50 ms: Other | 2 0.6, tako 2" in brief
    assert "3-step runs/s, 10 at once:" not in brief
    assert "**Not measured: third** cannot be set up on this machine: no wheel" in brief


def test_results_are_written_as_json_markdown_and_two_plots(results: report.Results) -> None:
    report.write(results.folder)
    figures = json.loads((results.folder / "results.json").read_text())["figures"]
    [drain] = [one for one in figures if one["peer"] == "restate" and one["workload"] == "drain"]
    assert (drain["median"], drain["low"], drain["high"], drain["rounds"]) == (901.0, 900.0, 902.0, 3)
    assert any(one.get("none") == "FAILED: it hung" for one in figures)
    for name in ("throughput.svg", "latency.svg"):
        assert "Other | 2" in (results.folder / name).read_text()


def test_the_short_table_goes_between_the_markers_of_a_page() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.put_into(page, "new") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"


def test_the_readme_shows_the_results_that_it_names() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    if report.BEGIN not in readme:
        pytest.skip("the README shows no results yet")
    shown = readme.split(report.BEGIN)[1].split(report.END)[0]
    [folder] = re.findall(r"\((benchmarks/results/[^/]+)/results.md\)", shown)
    assert report.brief(report.Results(ROOT / folder)) == shown.strip()


def test_a_median_stands_with_the_least_and_the_greatest_and_a_percentile_is_one_of_the_values() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (51.0, 100.0, 100.0)


def test_a_plot_of_shares_ends_with_all_of_them() -> None:
    found = plots.shares([float(n) for n in range(1000)])
    assert len(found) <= 202
    assert found[-1] == (999.0, 1.0)


def test_what_handlers_tell_arrives_in_order_with_its_run_and_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import told

    reader = Told()
    monkeypatch.setenv(VARIABLE, str(reader.path))
    told._end.cache_clear()
    for run in (7, 8):
        told.tell(BEGAN, run)
        told.tell(ENDED, run, 3)
    first, second = reader.wait(ENDED, 2, 10)
    assert (first.run, second.run, second.step) == (7, 8, 3)
    assert first.at < second.at
    reader.forget()
    with pytest.raises(TimeoutError, match="0 of 1"):
        reader.wait(BEGAN, 1, 0)
    reader.close()
    told._end.cache_clear()


def test_flushes_are_read_from_the_table_of_strace() -> None:
    table = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 93.10    0.005400          27       200           fdatasync
  6.90    0.000400         400         1         1 fsync
------ ----------- ----------- --------- --------- ----------------
100.00    0.005800          28       201         1 total
"""
    assert total(table) == 201


def test_a_history_is_copied_row_for_row_and_only_its_keys_differ(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "runs.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE runs (seq INTEGER PRIMARY KEY, name TEXT)")
        db.executemany("INSERT INTO runs VALUES (?, ?)", [(1, "a"), (2, "b")])
    in_sqlite(path, {"runs": {"seq": "seq + copy * many"}}, 3)
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT seq % 10, name FROM runs ORDER BY seq").fetchall()
    assert rows == [(1, "a"), (2, "b")] * 3
    with pytest.raises(LookupError, match="no column"):
        in_sqlite(path, {"runs": {"id": "1"}}, 3)
