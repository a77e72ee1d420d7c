"""The engines that are measured side by side: a name for each, and the class that brings it."""

from importlib import import_module

from benchmarks.peer import Peer

#: name: (file, class)
NAMES = {
    "tako-sqlite": ("tako", "TakoSqlite"),
    "tako-postgres": ("tako", "TakoPostgres"),
    "dbos-sqlite": ("dbos", "DbosSqlite"),
    "dbos-postgres": ("dbos", "DbosPostgres"),
    "absurd": ("absurd", "AbsurdPostgres"),
    "restate": ("restate", "RestateServer"),
    "huey": ("huey", "HueySqlite"),
    "procrastinate": ("procrastinate", "ProcrastinatePostgres"),
    "floor-sqlite": ("floor", "FloorSqlite"),
    "floor-postgres": ("floor", "FloorPostgres"),
}


def load(name: str) -> type[Peer]:
    """Raises ImportError where the engine is not installed."""
    file, cls = NAMES[name]
    found: type[Peer] = getattr(import_module(f"benchmarks.peers.{file}"), cls)
    return found
