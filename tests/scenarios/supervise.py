"""A supervisor as a process: `supervise.py FOLDER OPTIONS`; OPTIONS are the fields of `Group`, as JSON, `lease`, the
limits of `Supervisor`, `others` (what groups are that have no options), and `python`, the interpreter of its workers.

What it and its workers say goes to stdout, one JSON object a line. SIGTERM stops it.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import log, store
from tako_runtime.child import Group
from tako_runtime.supervisor import Supervisor


def say(source: str, event: dict[str, Any]) -> None:
    os.write(1, msgspec.json.encode({"source": source, **event}, enc_hook=str) + b"\n")


async def supervise(folder: str, options: dict[str, Any]) -> None:
    opened = store.current()
    limits = {name: options.pop(name) for name in ("lease", "start_limit", "stall_limit") if name in options}
    others = options.pop("others", {})
    sys.executable = options.pop("python", sys.executable)
    group = Group(**options)
    supervisor = Supervisor(
        opened, store.locate(), Path.cwd(), folder, {group.name: group}, say, other=lambda name: Group(name, **others),
        **limits,
    )  # fmt: skip
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, supervisor.stop)
    say("supervisor", {"event": "supervisor.started"})
    await supervisor.run()
    opened.close()


with log.sink(lambda event: say("supervisor", event)):
    asyncio.run(supervise(sys.argv[1], msgspec.json.decode(sys.argv[2])))
