"""What a worker has in hand, where a SIGKILL cannot erase it."""

from tako_runtime.inflight import InFlight, places
from tako_runtime.store import Home


def test_where_a_worker_was_is_read_from_its_file_and_one_of_another_release_says_nothing(home: Home) -> None:
    """A wrong place would be worse than none: an operator goes by it."""
    held = InFlight(home.app_dir, "w-1", room=3)
    slots = [held.take(seq) for seq in (7, 8, 9)]
    slots[0].note("charge", 1_000)
    slots[1].note("ü" * 500, 2_000)
    where = places(home.app_dir, "w-1")
    assert where(7) == ("in step charge", 1_000)
    assert where(8) == (f"in step {'ü' * 120}", 2_000)
    assert where(9) == ("before its first step", None)
    slots[0].give_up()
    assert places(home.app_dir, "w-1")(7) == ("before its first step", None)
    (home.app_dir / "workers" / "w-0").write_bytes(b"7 1000 in step charge".ljust(256, b"\0"))
    assert places(home.app_dir, "w-0")(7) == ("", None)
    held.close()


def test_a_workers_file_of_places_has_its_room_on_the_disk_from_the_start(home: Home) -> None:
    """Writing into a hole of a mapped file ends the process where the disk is full (SIGBUS)."""
    held = InFlight(home.app_dir, "w-1", room=100)
    try:
        taken = (home.app_dir / "workers" / "w-1").stat()
        assert taken.st_blocks * 512 >= taken.st_size > 0
    finally:
        held.close()
