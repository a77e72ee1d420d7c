"""Which versions of tako can work with a store: old and new releases side by side, on both kinds of store."""

from contextlib import closing

import pytest
from conftest import BOTH, Caller

from tako_runtime import store
from tako_runtime.errors import StoreError, StoreTooNew
from tako_runtime.store import Home, base, open_store, queries, version

STORES = BOTH


def later(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> None:
    """A tako whose migrations are those of today, and these."""
    known = queries.migrations

    def more(dialect: str) -> list[tuple[int, str]]:
        before = known(dialect)
        return [*before, *((before[-1][0] + n, script) for n, script in enumerate(scripts, 1))]

    monkeypatch.setattr(version, "migrations", more)


def today(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tako of today again."""
    monkeypatch.setattr(version, "migrations", queries.migrations)


def test_an_older_tako_works_on_with_a_store_that_only_grew_and_opens_it_anew(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_store(home)) as old:
        later(monkeypatch, "ALTER TABLE runs ADD COLUMN shade TEXT;", "CREATE TABLE shades (name TEXT);")
        with closing(open_store(home)) as new:
            caller = Caller(new)
            run_id = caller.enqueue()
            assert [run.id for run in old.do_sync(base.ListRuns())] == [run_id]
            caller.do = old.do_sync
            other = caller.enqueue()
        today(monkeypatch)
        with closing(open_store(home)) as anew:
            assert {run.id for run in anew.do_sync(base.ListRuns())} == {run_id, other}
    seen = store.examine(home)
    assert seen is not None
    assert (seen.version, seen.serves) == (seen.newest + 2, 1)


def test_a_migration_that_older_ones_cannot_live_with_is_refused_unless_asked_for(
    home: Home, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_store(home)) as opened:
        run_id = Caller(opened).enqueue()
    ours = version.newest(dialect)
    later(monkeypatch, f"-- serves: {ours + 1}\nALTER TABLE runs RENAME COLUMN losses TO lost;")
    with pytest.raises(StoreError, match=f"could not work with version {ours + 1}") as caught:
        open_store(home)
    assert "--breaking" in caught.value.hint
    today(monkeypatch)
    with closing(open_store(home)) as opened:  # nothing was changed
        assert [run.id for run in opened.do_sync(base.ListRuns())] == [run_id]
    later(monkeypatch, f"-- serves: {ours + 1}\nALTER TABLE runs RENAME COLUMN losses TO lost;")
    store.migrate(home, breaking=True)
    today(monkeypatch)
    with pytest.raises(StoreTooNew, match=f"knows versions up to {ours}") as too_new:
        open_store(home)
    assert f"for a tako that knows version {ours + 1}" in str(too_new.value)


def test_a_migration_that_fails_leaves_the_store_as_it_was(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_store(home)) as opened:
        run_id = Caller(opened).enqueue()
    later(monkeypatch, "ALTER TABLE runs ADD COLUMN shade TEXT; SELECT no_such_column FROM runs;")
    with pytest.raises(StoreError, match="no_such_column"):
        open_store(home)
    today(monkeypatch)
    with closing(open_store(home)) as opened:
        assert [run.id for run in opened.do_sync(base.ListRuns())] == [run_id]
    seen = store.examine(home)
    assert seen is not None
    assert seen.version == seen.newest
