"""All that `python -m tako_runtime serve` is, but for the lock that lets only one of a host supervise an app: so two of
it are as two servers with one store. Events go to stdout, one JSON object a line."""

import asyncio
from pathlib import Path

from tako_runtime import config, log, store
from tako_runtime.server import Server, serve

opened, lines = store.current(), log.JsonLines(1, log.DEBUG)


async def run() -> None:
    loaded = config.load(Path.cwd() / "tako.toml")
    await serve(Server(opened, store.locate(), loaded, lines.pass_on, log_level="debug"))


with log.sink(lines):
    asyncio.run(run())
opened.close()
lines.flush()
