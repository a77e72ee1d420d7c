"""drain: runs of three steps, one worker, every commit synced; beside the floor: its rows in bulk, by plain apsw."""

from benchmarks import engine, floor
from benchmarks.engine import Drained
from benchmarks.measure import Row, Target, in_fresh_process, new_home, pairs

#: concurrency: (runs, quick runs, target)
SIZES = {
    1: (500, 200, None),
    10: (5_000, 1_500, Target(">=", 0.5)),
    100: (15_000, 5_000, Target(">=", 0.4)),
}


#: In turns: the engine, the floor, the engine with its log, and the floor with one statement for each row.
VARIANTS = ((engine.drain, False), (floor.drain, True), (engine.drain, True), (floor.drain, False))


def measure(quick: bool) -> list[Row]:
    rows = []
    for concurrency, (many, few, target) in SIZES.items():
        drained: list[list[Drained]] = [[] for _ in VARIANTS]
        for _ in range(3 if quick else 7):
            for (drain, variant), found in zip(VARIANTS, drained, strict=True):
                with new_home() as home:
                    found.append(in_fresh_process(drain, home, few if quick else many, concurrency, variant))
        one, other = drained[0][-1], drained[1][-1]
        note = (
            f"commits a run {one.commits / one.runs:.3f}, floor {other.commits / other.runs:.3f}; "
            f"CPU a run {one.cpu / one.runs * 1e6:.0f} us, floor {other.cpu / other.runs * 1e6:.0f} us"
        )
        rates, bulk, logged, singly = ([each.rate for each in found] for found in drained)
        what = f"concurrency {concurrency}"
        rows.append(pairs(what, "runs/s", rates, bulk, target, note))
        rows.append(pairs(f"{what}, logging", "runs/s", logged, bulk))
        rows.append(pairs(f"{what}, floor row by row", "runs/s", rates, singly))
    return rows
