"""A worker that is killed at one point of its talk with the store: `DIE` is "ClaimRuns before", "SaveStep after", …;
the file `MARKER` sees to it that this happens once."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))

from scenarios.flows._bodies import die, first
from tako_runtime.__main__ import main
from tako_runtime.store.base import Operation, Topics
from tako_runtime.store.sqlite import SqliteStore

operation, when = os.environ["DIE"].split()
execute = SqliteStore.execute


def execute_and_die(self: SqliteStore, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
    here = any(type(op).__name__ == operation for op in batch)
    if here and when == "before" and first(os.environ["MARKER"]):
        die()
    done = execute(self, batch)
    claimed_nothing = operation == "ClaimRuns" and not any(done[0])
    if here and when == "after" and not claimed_nothing and first(os.environ["MARKER"]):
        die()
    return done


SqliteStore.execute = execute_and_die  # type: ignore[method-assign]
os._exit(main(sys.argv[1:]))
