"""drain: runs of three steps, one worker, every commit synced; beside the floor: its rows by plain apsw."""

from benchmarks import engine, floor
from benchmarks.engine import Drained
from benchmarks.measure import Row, Target, in_fresh_process, new_home, pairs

#: concurrency: (runs, quick runs, target)
SIZES = {
    1: (500, 200, None),
    10: (5_000, 1_500, Target(">=", 0.5)),
    100: (15_000, 5_000, Target(">=", 0.4)),
}


#: In turns: the engine, the floor, and the engine with its log.
VARIANTS = ((engine.drain,), (floor.drain,), (engine.drain, True))


def measure(quick: bool) -> list[Row]:
    rows = []
    for concurrency, (many, few, target) in SIZES.items():
        drained: list[list[Drained]] = [[] for _ in VARIANTS]
        for _ in range(3 if quick else 7):
            for (drain, *logged), found in zip(VARIANTS, drained, strict=True):
                with new_home() as home:
                    found.append(in_fresh_process(drain, home, few if quick else many, concurrency, *logged))
        one, other = drained[0][-1], drained[1][-1]
        note = (
            f"commits a run {one.commits / one.runs:.3f}, floor {other.commits / other.runs:.3f}; "
            f"CPU a run {one.cpu / one.runs * 1e6:.0f} us, floor {other.cpu / other.runs * 1e6:.0f} us"
        )
        rates, floors, logging = ([each.rate for each in found] for found in drained)
        what = f"concurrency {concurrency}"
        rows.append(pairs(what, "runs/s", rates, floors, target, note))
        rows.append(pairs(f"{what}, logging", "runs/s", logging, floors))
    return rows
