"""What is asked of an app where it runs, by a tako that may be another one than the one there."""

import pytest

from tako_runtime.errors import NotFound
from tako_runtime.manifest import Manifest
from tako_runtime.site import Site, answer, answered, asked
from tako_runtime.store import Home
from tako_runtime.store.commit import StoreThread


@pytest.fixture
def site(opened: StoreThread, home: Home) -> Site:
    return Site(opened, home, Manifest)


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        (b'{"ask": "dance", "given": {}}', "'dance'"),
        (b'{"ask": "prune", "given": {"before": 1, "sideways": true}}', "'sideways' of operation 'prune'"),
    ],
    ids=["an operation", "an argument"],
)
def test_what_came_with_a_later_tako_is_refused_with_what_to_do(site: Site, line: bytes, unknown: str) -> None:
    said: list[bytes] = []
    answer(site, [line, asked("now", (), {})], said.append)
    with pytest.raises(NotFound, match=f"the tako there knows no .*{unknown}") as refused:
        answered("prune", said[0])
    assert refused.value.hint == "Deploy with the tako of here."
    assert answered("now", said[1]) == pytest.approx(site.now(), abs=60_000_000)
