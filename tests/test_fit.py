"""Which live runs a release would not know any more: names read off its source, and what the store has."""

import textwrap
from pathlib import Path

import pytest
from conftest import Caller
from msgspec import structs

from tako_runtime.control import Control
from tako_runtime.fit import step_names, unfit
from tako_runtime.manifest import Declared, Manifest
from tako_runtime.store import Home, Local, base
from tako_runtime.store.commit import StoreThread

CODE = """
    from tako_runtime import workflow
    from workflows import shared

    @workflow("order")
    async def order(payload, step):
        await step.run("charge", shared.charge)
        await step.wait_for(f"approval:{payload.id}")
        await step.sleep("3d", name="cool-off")
        await shared.parcel(step)

    @workflow("bulk")
    async def bulk(payload, step):
        for name in payload:
            await step.run(name, print)
"""
SHARED = """
    import asyncio

    async def parcel(step):
        await step.run(name="ship", fn=print)

    def main():
        asyncio.run(parcel(None))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "flows.py").write_text(textwrap.dedent(CODE).lstrip())
    (tmp_path / "workflows" / "shared.py").write_text(textwrap.dedent(SHARED))
    return tmp_path


def declared(name: str, line: int) -> Declared:
    return Declared(name, "default", 2, 1, 1, None, "workflows/flows.py", line)


FLOWS = (declared("order", 4), declared("bulk", 11))


def test_names_are_read_off_the_handler_and_off_what_it_hands_its_step_to(project: Path) -> None:
    names = step_names(project, FLOWS)["order"]
    assert all(names.has(name) for name in ("charge", "approval:42", "cool-off", "ship"))
    assert not names.has("refund")
    assert not names.open


def test_a_name_that_is_computed_may_be_any(project: Path) -> None:
    assert step_names(project, FLOWS)["bulk"].open


def test_the_names_in_another_workflow_are_not_those_of_this_one(project: Path) -> None:
    assert not step_names(project, FLOWS)["bulk"].has("charge")


def test_the_lines_that_the_manifest_has_are_those_of_the_handlers(project: Path) -> None:
    """Which is what the names are found by."""
    import os

    from tako_runtime.manifest import read

    (project / "workflows" / "shared.py").write_text("async def parcel(step): ...\ndef charge(): ...\n")
    found = {flow.name: flow.line for flow in read(project, "workflows", os.environ).workflows}
    assert found == {flow.name: flow.line for flow in FLOWS}


def test_runs_without_their_workflow_are_orphaned(caller: Caller, opened: StoreThread, project: Path) -> None:
    caller.enqueue(workflow="gone")
    caller.enqueue(workflow="gone")
    caller.enqueue()
    found = unfit(Control(opened), Manifest(FLOWS), project)
    assert found["orphaned"] == {"gone": 2}
    assert found["strange"] == []


def test_a_run_that_has_finished_a_step_that_is_not_there_any_more_is_named_with_it(
    caller: Caller, opened: StoreThread, project: Path
) -> None:
    run = caller.started()
    for position, name in enumerate(["charge", "charge#2", "refund", "ship"], 1):
        caller.save(run, name, position)
    found = unfit(Control(opened), Manifest(FLOWS), project)
    assert found["strange"] == [{"id": run.id, "workflow": "order", "steps": ["refund"]}]


def test_of_many_live_runs_none_is_passed_over_however_old_it_is(
    caller: Caller, opened: StoreThread, project: Path
) -> None:
    oldest = caller.started()
    caller.save(oldest, "refund")
    caller.do(base.Enqueue(runs=[caller.new(workflow="gone") for _ in range(2_100)], now=caller.now))
    last = caller.enqueue()
    found = unfit(Control(opened), Manifest(FLOWS), project)
    assert [run["id"] for run in found["strange"]] == [oldest.id]
    assert found["orphaned"] == {"gone": 2_100}
    page = caller.do(base.LiveRuns(limit=2_101))
    assert (len(page), page[-1]) == (2_101, base.Live(last, "order", "pending", ()))
    assert caller.do(base.LiveRuns(after=page[-1])) == [base.Live(oldest.id, "order", "running", ["refund"])]


def test_of_many_strange_runs_some_are_named_and_all_are_counted(
    caller: Caller, opened: StoreThread, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tako_runtime.fit.MOST", 2)
    for _ in range(5):
        caller.save(caller.started(), "refund")
    found = unfit(Control(opened), Manifest(FLOWS), project)
    assert (len(found["strange"]), found["more"]) == (2, 3)


def test_a_run_whose_code_computes_names_is_only_counted(caller: Caller, opened: StoreThread, project: Path) -> None:
    caller.enqueue(workflow="bulk")
    [claimed] = caller.claim(workflows=("bulk",))
    caller.save(claimed.run, "row-1")
    found = unfit(Control(opened), Manifest(FLOWS), project)
    assert (found["strange"], found["unread"]) == ([], 1)


def test_a_run_that_fits_is_not_spoken_of(caller: Caller, opened: StoreThread, project: Path) -> None:
    caller.save(caller.started(), "charge")
    found = unfit(Control(opened), Manifest(FLOWS), project)
    assert (found["orphaned"], found["strange"], found["unread"]) == ({}, [], 0)


@pytest.mark.parametrize("dialect", ["postgres"])
def test_runs_whose_workflow_has_become_local_or_is_so_no_longer_are_counted(
    caller: Caller, opened: StoreThread, home: Home, project: Path
) -> None:
    caller.enqueue(workflow="order")
    local = Local(home)
    beside = Caller(local.made())
    beside.enqueue(workflow="bulk")
    beside.enqueue(workflow="order")
    control = Control(opened, local=local)
    assert unfit(control, Manifest(FLOWS), project)["elsewhere"] == {"bulk": 1, "order": 1}
    anew = tuple(structs.replace(flow, local=True) for flow in FLOWS)
    assert unfit(control, Manifest(anew), project)["elsewhere"] == {"order": 1}
    local.close()


def test_where_there_is_one_store_no_run_is_elsewhere(caller: Caller, opened: StoreThread, project: Path) -> None:
    caller.enqueue()
    anew = tuple(structs.replace(flow, local=True) for flow in FLOWS)
    assert unfit(Control(opened), Manifest(anew), project)["elsewhere"] == {}
