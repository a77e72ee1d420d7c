"""`tako doctor`: what is wrong here, each thing with its mend. `project.py` looks at a project and `disk.py` at what it
is on, `machine.py` at what any project needs. A check takes what it looks at and answers with findings; none of them
changes anything."""

from typing import NamedTuple


class Finding(NamedTuple):
    """What one check has found: `ok` and no mend, all is well; `ok` and a mend, a warning; not `ok`, broken."""

    check: str
    ok: bool
    message: str
    mend: str = ""

    @property
    def level(self) -> str:
        return "broken" if not self.ok else "warning" if self.mend else "ok"


def well(check: str, message: str) -> Finding:
    return Finding(check, True, message)


def warning(check: str, message: str, mend: str) -> Finding:
    return Finding(check, True, message, mend)


def broken(check: str, message: str, mend: str) -> Finding:
    return Finding(check, False, message, mend)
