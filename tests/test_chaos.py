"""A short night of crashes; `make chaos` is the long one."""

import pytest
from chaos import night


@pytest.mark.slow
def test_whatever_is_killed_and_stopped_every_acknowledged_run_ends_exactly_once() -> None:
    assert "runs 300;" in night(runs=300, strikes=15, seed=20261125)
