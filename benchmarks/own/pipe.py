"""How a handler says, to who measures, when it began."""

import os
import select
from pathlib import Path

from tako_runtime.store import Home

#: Where `python -m tako_runtime` finds the workflows, and this package.
ROOT, FOLDER = Path(__file__).parents[2], "benchmarks/own/workflows"


class Pipe:
    """A named pipe through which a handler says when it began."""

    def __init__(self, home: Home) -> None:
        self.path = str(home.data_dir / "times")
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDWR)

    def read(self, seconds: float = 30) -> int:
        if not select.select([self._end], [], [], seconds)[0]:
            raise TimeoutError(f"no handler has begun within {seconds:g} s")
        return int.from_bytes(os.read(self._end, 8), "big")

    def close(self) -> None:
        os.close(self._end)
