"""A workflow that says which version of its code it is."""

import os
import time
from pathlib import Path

from tako_runtime import Step, workflow

NUMBER = 0


@workflow("tell-version")
async def tell_version(payload: str, step: Step) -> None:
    """Write when the first line ran, and of which version, into the named pipe `payload`."""
    began = time.monotonic_ns()
    pipe = os.open(Path(payload), os.O_WRONLY)
    os.write(pipe, began.to_bytes(8, "big") + NUMBER.to_bytes(8, "big"))
    os.close(pipe)
