"""All that `python -m tako_runtime serve` is, but for the lock that lets only one of a host supervise an app: so two of
it are as two servers with one store, each with the host's name that it is given. Events go to stdout, one JSON object a
line."""

import asyncio
import socket
import sys
from pathlib import Path

from tako_runtime import config, log, store
from tako_runtime.alone import Lock
from tako_runtime.server import Server, serve

socket.gethostname = lambda: sys.argv[1]
opened, lines = store.current(), log.JsonLines(1, log.DEBUG)


async def run() -> None:
    loaded = config.load(Path.cwd() / "tako.toml")
    home = store.locate()
    with Lock(home.app_dir, "supervisor") as lock:  # which nobody takes
        await serve(Server(opened, home, loaded, lines.pass_on, log_level="debug"), lock)


with log.sink(lines):
    asyncio.run(run())
opened.close()
lines.flush()
