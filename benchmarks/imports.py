"""imports: what a process pays before it does anything; beside a Python that does nothing."""

import importlib.util
import subprocess
import sys
import time

from benchmarks.measure import Row, pairs


def measure(quick: bool) -> list[Row]:
    cases = {"import tako_runtime": ["-c", "import tako_runtime"]}
    if importlib.util.find_spec("tako_cli.app"):
        cases["tako --help"] = ["-m", "tako_cli", "--help"]
    rows = []
    for what, words in cases.items():
        measured, beside = [], []
        for _ in range(5 if quick else 15):
            measured.append(_milliseconds(words))
            beside.append(_milliseconds(["-c", "pass"]))
        rows.append(pairs(what, "ms", measured, beside))
    return rows


def _milliseconds(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1e3
