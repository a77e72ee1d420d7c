"""python -m benchmarks.cell: one measurement, in a process of its own; its result is the last line of stdout, as JSON.

`{"peer", "setting", "workload", "concurrency", "scale", "url", "history"}` on stdin. What goes wrong here, or hangs,
takes nothing of the others with it.
"""

import json
import sys
import traceback
from typing import Any

from benchmarks.peers import load
from benchmarks.place import new_place
from benchmarks.workloads import WORKLOADS


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """`{"found": numbers}`, or `{"failed": why}`."""
    cls = load(asked["peer"])
    options = {**cls.settings[asked["setting"]], "concurrency": asked["concurrency"]}
    with new_place(asked["url"], options) as place:
        peer = cls(place)
        try:
            peer.prepare()
            peer.connect()
            found = WORKLOADS[asked["workload"]](peer, asked["scale"])
            peer.close()
            return {"found": found}
        except Exception as error:  # noqa: BLE001 whatever it is, it is this cell's result
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
            return {"failed": said[:600], "output": place.output()[-3000:]}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(measure(json.load(sys.stdin))) + "\n")
