"""start: no worker is up, a supervisor is: from an enqueue to the first line of its handler, in a project as scaffolded
by `tako init`. Below it, what of that is whose: each row does what the one before it does, in a process of its own."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import Row, Target, new_home, row, wait_until
from benchmarks.own.engine import Opened
from benchmarks.own.pipe import FOLDER, ROOT, Pipe
from benchmarks.own.supervised import children, supervisor
from benchmarks.own.workflows.idle_work import tell_time
from tako_cli.scaffold import scaffold
from tako_runtime import clock
from tako_runtime.child import Group

#: What a worker does before it claims, one step after the other.
STEPS = {
    "Python that does nothing": "pass",
    "and the modules of a worker": "from tako_runtime import __main__",
    "and the project's workflows": "from pathlib import Path; from tako_runtime import __main__, manifest; "
    "list(manifest.discover(Path.cwd(), 'workflows'))",
}


def measure(quick: bool) -> list[Row]:
    found = []
    with new_home() as home:
        _, project = scaffold("shop", "shop", home.data_dir, ask=False)
        shutil.copy(ROOT / FOLDER / "idle_work.py", project / "workflows")
        opened, pipe = Opened(home), Pipe(home)
        with supervisor(home, Group(idle_timeout=clock.SECOND // 10), project, "workflows") as boss:
            for _ in range(4 if quick else 12):
                called = time.monotonic_ns()
                tell_time.enqueue_sync(pipe.path)
                found.append((pipe.read() - called) / 1e6)
                wait_until(lambda: not children(boss), "the worker's leaving")
                time.sleep(0.5)  # until the supervisor has gone to sleep again
        opened.close()
        pipe.close()
        rows = [row("enqueue to handler", "ms", found[1:], Target("<", 300))]  # the first one waits for the supervisor
        for what, code in STEPS.items():
            rows.append(
                row(f"of that: {what}", "ms", [_milliseconds(code, project) for _ in range(5 if quick else 15)])
            )
    return rows


def _milliseconds(code: str, project: Path) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project)
    return (time.perf_counter() - began) * 1e3
