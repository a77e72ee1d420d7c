"""The work, the same for every engine: what the steps do, and what a run is given.

Each engine brings three handlers made of these, in its own way: `sequence` (so many steps, one after the other),
`fanout` (so many at once) and `sleeper` (a durable sleep until a given time).
"""

import os
import time
from typing import Any

from benchmarks.told import STEP, tell

SEQUENCE, FAN_OUT, SLEEPER = "sequence", "fanout", "sleeper"

Payload = dict[str, Any]


def payload(run: int, steps: int = 3, wake: float = 0.0, hold: str = "") -> Payload:
    """About what an order's id and address take. `wake` is in seconds of the epoch; `hold` is a file: see `body`."""
    return {
        "run": run, "steps": steps, "wake": wake, "hold": hold,
        "order": "2024-000123", "customer": "Ada Lovelace", "ship_to": "12 St James's Square",
    }  # fmt: skip


def body(given: Payload, step: int) -> int:
    """One step. The second one of a run that has a `hold` never ends, the first time: it waits to be killed."""
    tell(STEP, given["run"], step)
    if given["hold"] and step == 2:
        try:
            os.close(os.open(given["hold"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return 1
        while True:
            time.sleep(60)
    return 1


async def async_body(given: Payload, step: int) -> int:
    """The same, for engines whose handlers are coroutines."""
    return body(given, step)
