"""steps: one run of 1,000 steps in sequence that do nothing; beside the floor: the same rows, a commit each."""

from benchmarks import engine, floor
from benchmarks.measure import Row, Target, in_fresh_process, new_home, pairs

STEPS = 1_000


def measure(quick: bool) -> list[Row]:
    measured, beside = [], []
    for _ in range(3 if quick else 9):
        with new_home() as home:
            measured.append(in_fresh_process(engine.one_long_run, home, STEPS))
        with new_home() as home:
            beside.append(in_fresh_process(floor.one_long_run, home, STEPS))
    note = (
        f"commits a step {measured[-1].commits / STEPS:.3f}, floor {beside[-1].commits / STEPS:.3f}; "
        f"CPU a step {measured[-1].cpu / STEPS * 1e6:.0f} us, floor {beside[-1].cpu / STEPS * 1e6:.0f} us"
    )
    each = [[one.seconds / STEPS * 1e6 for one in some] for some in (measured, beside)]
    return [pairs("one step, beside one commit", "us", *each, Target("<", 2.5), note)]
