"""A script as `python SCRIPT` runs it, for `tako run`: the project's modules can be imported, its secrets are there."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from tako_runtime import config
from tako_runtime.masking import guard
from tako_runtime.secrets import receive


def run_script(script: str, words: Sequence[str]) -> NoReturn:
    """Run it to its end, which is this process's own. The secrets are received, and their pipe closed, before its first
    line: nothing that it starts inherits them."""
    guard(receive())
    file, project = Path(script).absolute(), config.find()
    places = [str(file.parent), *([str(project.parent)] if project else [])]
    sys.path[: 0 if sys.flags.safe_path else 1] = dict.fromkeys(places)
    sys.argv = [script, *words]

    def shown(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """A traceback begins in the script, not in what runs it; that of a syntax error has only its own lines."""
        while trace is not None and trace.tb_frame.f_code.co_filename != script:
            trace = trace.tb_next
        sys.__excepthook__(kind, error.with_traceback(trace), trace)

    sys.excepthook = shown
    runpy.run_path(script, run_name="__main__")
    sys.exit()
