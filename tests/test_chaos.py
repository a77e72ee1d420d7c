"""A short night of crashes; `make chaos` is the long one."""

from collections.abc import Iterator

import pytest
from chaos import night
from postgres import NoPostgres, Server


@pytest.mark.slow
def test_whatever_is_killed_and_stopped_every_acknowledged_run_ends_exactly_once() -> None:
    assert "runs 300;" in night(runs=300, strikes=15, seed=20261125)


@pytest.fixture
def own() -> Iterator[Server]:
    try:
        one = Server()
    except NoPostgres as error:
        pytest.skip(f"NO POSTGRES: {error}")
    yield one
    one.close()


@pytest.mark.slow
def test_three_servers_and_their_database_may_die_and_every_acknowledged_run_ends_exactly_once(own: Server) -> None:
    assert "runs 300;" in night(runs=300, strikes=15, seed=20261125, database=own, servers=3)
