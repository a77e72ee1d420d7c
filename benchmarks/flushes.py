"""How often processes tell the disk to keep what was written, counted by strace where the machine has it."""

import contextlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CALLS = ("fsync", "fdatasync")


class NotCounted(Exception):
    """There is no strace here, or it may not look at these processes."""


class Count:
    """`total` is there once the block has ended."""

    total: int


@contextlib.contextmanager
def counted(pids: Sequence[int]) -> Iterator[Count]:
    """All threads of these processes, and what they start meanwhile.

    Raises:
        NotCounted: it says why.
    """
    if shutil.which("strace") is None:
        raise NotCounted("there is no strace on this machine")
    count = Count()
    with tempfile.NamedTemporaryFile(prefix="tako-strace-") as output, tempfile.TemporaryFile() as said:
        words = ["strace", "-f", "-c", "-e", f"trace={','.join(CALLS)}", "-o", output.name]
        for pid in pids:
            words += ["-p", str(pid)]
        tracer = subprocess.Popen(words, stderr=said)
        try:
            _until_attached(tracer, pids)
            yield count
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(10)
        count.total = total(Path(output.name).read_text())


def _until_attached(tracer: "subprocess.Popen[bytes]", pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 5
    while not all(_tracer_of(pid) for pid in pids):
        if tracer.poll() is not None or time.monotonic() > deadline:
            raise NotCounted("strace may not look at these processes here")
        time.sleep(0.01)


def _tracer_of(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("TracerPid:")]
    return int(line.split()[1])


def total(summary: str) -> int:
    """Of strace's own table: the calls of the lines that we asked for."""
    lines = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", summary, re.MULTILINE)
    return sum(int(calls) for calls, name in lines if name in CALLS)
