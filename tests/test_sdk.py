"""The SDK from a process with nothing beside it, and its public names."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import finished, script
from declared import Order, declared, runs

import tako_runtime
from tako_runtime import signal_sync, store
from tako_runtime.errors import (
    ConfigError,
    StoreError,
    TakoUnavailable,
)
from tako_runtime.run import Run
from tako_runtime.store import Home, base, open_store

pytestmark = pytest.mark.usefixtures("clean_registry")


# --- from a process with nothing beside it ---------------------------------------------------------------------------

APP = """
    import asyncio, json, sys
    from tako_runtime import TakoError, signal, signal_sync, store, workflow

    @workflow("order")
    async def order(payload, step): ...

    async def main():
        return [await order.enqueue(1), *await order.enqueue_many([2, 3]), await signal("a")]

    try:
        told = asyncio.run(main()) + [order.enqueue_sync(4), *order.enqueue_many_sync([5]), signal_sync("b")]
        print(json.dumps({"told": told, "at": str(store.locate().app_dir)}))
    except TakoError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error), "hint": error.hint}))
"""


def asked(home: Home | None = None, cwd: Path | None = None, **env: str) -> dict[str, Any]:
    setting = "".join(f"import os; os.environ[{name!r}] = {value!r}\n" for name, value in env.items())
    told: dict[str, Any] = json.loads(finished(script(setting + inspect.cleandoc(APP), home=home, cwd=cwd)))
    return told


def kept_in(home: Home) -> tuple[list[Run], list[base.KeptSignal]]:
    opened = open_store(home)
    found = runs(opened), opened.do_sync(base.KeptSignals(now=0))
    opened.close()
    return found


def test_a_script_with_the_variables_set_enqueues_and_signals_with_nothing_else_running(home: Home) -> None:
    told = asked(home)
    assert told["at"] == str(home.app_dir)
    found, signals = kept_in(home)
    assert sorted(run.payload for run in found) == [b"1", b"2", b"3", b"4", b"5"]
    assert {run.id for run in found} == {each for each in told["told"] if each}
    assert [kept.name for kept in signals] == ["a", "b"]


def test_a_script_in_a_project_finds_the_nearest_file_upwards(home: Home) -> None:
    root = home.data_dir.resolve()
    (root / "tako.toml").write_text('name = "outer"\n')
    inner = root / "inner"
    deep = inner / "a" / "b"
    deep.mkdir(parents=True)
    (inner / "tako.toml").write_text('name = "market"\n')
    told = asked(cwd=deep)
    assert told["at"] == str(inner / ".tako" / "apps" / "market")
    assert len(kept_in(store.project_home("market", inner))[0]) == 5
    assert asked(cwd=root)["at"] == str(root / ".tako" / "apps" / "outer")


def test_the_variables_win_over_a_project(home: Home) -> None:
    (home.data_dir / "tako.toml").write_text('name = "market"\n')
    assert asked(home, cwd=home.data_dir)["at"] == str(home.app_dir)


def test_a_script_that_belongs_to_no_app_is_told_what_to_do(home: Home) -> None:
    told = asked(cwd=home.data_dir)
    assert told["error"] == "TakoUnavailable"
    for part in ("no tako.toml", str(home.data_dir.resolve()), "TAKO_APP_NAME", "TAKO_DATA_DIR"):
        assert part in told["message"]
    assert "set TAKO_APP_NAME and TAKO_DATA_DIR" in told["hint"]
    assert list(home.data_dir.iterdir()) == []


@pytest.mark.parametrize(("there", "missing"), [("TAKO_APP_NAME", "TAKO_DATA_DIR"), ("TAKO_DATA_DIR", "TAKO_APP_NAME")])
def test_half_of_the_pair_is_an_error_even_inside_a_project(home: Home, there: str, missing: str) -> None:
    (home.data_dir / "tako.toml").write_text('name = "market"\n')
    told = asked(cwd=home.data_dir, **{there: "shop"})
    assert told["error"] == "TakoUnavailable"
    assert told["message"] == f"{there} is set and {missing} is not"


@pytest.mark.parametrize("app", ["Shop", "-shop", "shop-", "../shop", "s" * 64, "sh op"])
def test_a_variable_that_is_no_apps_name_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch, app: str) -> None:
    monkeypatch.setenv("TAKO_APP_NAME", app)
    monkeypatch.setenv("TAKO_DATA_DIR", str(home.data_dir))
    with pytest.raises(ConfigError, match="TAKO_APP_NAME"):
        store.locate()


def test_a_child_finds_the_same_home_by_the_environment_that_is_made_for_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    assert store.locate() == home


def test_a_store_that_cannot_be_opened_is_an_error_each_time_and_works_once_it_can(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    in_the_way = home.data_dir / "apps"
    in_the_way.write_text("a file")
    for _ in range(2):
        with pytest.raises(StoreError):
            signal_sync("go")
    in_the_way.unlink()
    try:
        assert signal_sync("go") == 0
    finally:
        store.current().close()
        store.use(None)


def test_half_of_the_pair_in_this_process_is_told_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKO_APP_NAME", "shop")
    with pytest.raises(TakoUnavailable, match="TAKO_DATA_DIR is not"):
        declared().enqueue_sync(Order(1))


# --- the public names ------------------------------------------------------------------------------------------------


def test_the_package_offers_what_it_lists_and_every_error_is_an_error_of_tako() -> None:
    assert len(set(tako_runtime.__all__)) == len(tako_runtime.__all__)
    for name in tako_runtime.__all__:
        offered = getattr(tako_runtime, name)
        if inspect.isclass(offered) and issubclass(offered, Exception):
            assert issubclass(offered, tako_runtime.TakoError)
    assert not issubclass(tako_runtime.Suspension, Exception)
