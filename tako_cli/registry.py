"""The servers in the user's tako.toml, edited in place: what else is in the file, comments too, stays as it is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tako_runtime import config
from tako_runtime.errors import NotFound, Refused


def add(path: Path, name: str, host: str, env: str) -> None:
    """A new server, and in an environment. Raises `ConfigError` where the file would be wrong with it."""

    def change(document: Any) -> None:
        import tomlkit

        if name in document.get("servers", {}):
            raise Refused(f"there is a server {name} already", hint=f"Take it out first: tako servers rm {name}")
        for table in ("envs", "servers"):
            if table not in document:
                document.add(table, tomlkit.table(is_super_table=True))
        if env not in document["envs"]:
            document["envs"][env] = tomlkit.table()
        document["envs"][env].setdefault("servers", tomlkit.array()).append(name)
        one = tomlkit.table()
        one["host"] = host
        document["servers"][name] = one

    _edit(path, change)


def remove(path: Path, name: str) -> list[str]:
    """Take a server out, and out of its environments; those that are without servers now go with it. Their names."""
    emptied: list[str] = []

    def change(document: Any) -> None:
        known = document.get("servers", {})
        if name not in known:
            raise NotFound(f"there is no server {name!r}", hint=f"There is: {', '.join(known) or 'none'}.")
        del known[name]
        for env, told in list(document.get("envs", {}).items()):
            if name in told.get("servers", ()):
                told["servers"].remove(name)
                if not told["servers"]:
                    emptied.append(env)
                    del document["envs"][env]
        for table in ("envs", "servers"):
            if table in document and not document[table]:
                del document[table]

    _edit(path, change)
    return emptied


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    """The file as it was or as it is to be, at any time, and never one that tako could not read."""
    import tomlkit

    document = tomlkit.parse(path.read_bytes().decode())
    change(document)
    data = tomlkit.dumps(document).encode()
    config.parse(data, path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(data)
        fresh.chmod(path.stat().st_mode & 0o777)
        fresh.replace(path.resolve())
    finally:
        fresh.unlink(missing_ok=True)
