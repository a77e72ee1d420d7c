"""A short night of crashes; `make chaos` is the long one."""

import pytest
from chaos import night
from postgres import Server


@pytest.mark.slow
def test_whatever_is_killed_and_stopped_every_acknowledged_run_ends_exactly_once() -> None:
    assert "runs 300;" in night(runs=300, strikes=15, seed=20261125)


@pytest.mark.slow
def test_three_servers_and_their_database_may_die_and_every_acknowledged_run_ends_exactly_once(own: Server) -> None:
    assert "runs 300;" in night(runs=300, strikes=15, seed=20261125, database=own, servers=3)
