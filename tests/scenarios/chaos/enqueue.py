"""Enqueue runs with the numbers `first`, `first + by`, ... below `end`, one by one; write down what was acknowledged.

Killed and started again, it goes on with what it has not written down. A number's run is the same while it lives.
"""

import os
import sys
from pathlib import Path

from workflows import kinds

from tako_runtime import signal_sync

KINDS = (kinds.steps, kinds.flaky, kinds.sleeps, kinds.asks, kinds.fans, kinds.renders)


def main() -> None:
    first, by, end = map(int, sys.argv[1:4])
    book = Path(sys.argv[4])
    done = set(book.read_text().split("\n")) if book.exists() else set()
    started = {line.split()[1] for line in done if line.startswith("run ")}
    file = os.open(book, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for n in range(first, end, by):
        flow = KINDS[n % len(KINDS)]
        if str(n) not in started:
            os.write(file, f"run {n} {flow.enqueue_sync(n, unique_key=f'order:{n}')}\n".encode())
        if flow is kinds.asks and f"signal {n}" not in done:
            signal_sync(f"go:{n}", n)
            os.write(file, f"signal {n}\n".encode())


main()
