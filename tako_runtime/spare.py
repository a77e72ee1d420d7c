"""A worker process that stands by: it has imported all but the project's own code, and waits to be told what to be.

Half of the time that a worker takes to start goes into the interpreter, the runtime and the packages that the project
uses. A spare has that behind it when a file is saved.
"""

import importlib
from collections.abc import Iterator, Mapping

import msgspec

from tako_runtime.child import Child
from tako_runtime.process import inherited

#: So much fits into a pipe that nobody reads yet, wherever that is.
_FITS = 16_000


class Order(msgspec.Struct, frozen=True):
    """What a spare is to be: the words of `worker`, and its environment."""

    words: tuple[str, ...]
    environment: dict[str, str]


class Spare:
    """The place for one."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def put(self, child: Child, modules: list[str]) -> None:
        """A process that was started with `--spare`, and what it should import meanwhile, the first ones first."""
        self.discard()
        self._child = child
        room = 0
        fitting = [name for name in modules if (room := room + len(name) + 3) < _FITS]
        child.tell(msgspec.json.encode(fitting))

    def take(self, words: list[str], environment: Mapping[str, str]) -> Child | None:
        """It begins to be that worker; None where none stands by."""
        child, self._child = self._child, None
        if child is None or not child.alive():
            return None
        child.tell(msgspec.json.encode(Order(tuple(words), inherited(environment))))
        return child

    def discard(self) -> None:
        """End it: what it was given when it was started is not true any more."""
        child, self._child = self._child, None
        if child is not None:
            child.discard()


def stand_by(lines: Iterator[bytes]) -> tuple[list[str], Order]:
    """In the spare itself: import what it is told to, then wait for the order. Raises `StopIteration` where none comes,
    since the supervisor is gone."""
    modules = msgspec.json.decode(next(lines), type=list[str])
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException:  # noqa: BLE001, S112 -- it only saves time: whoever needs it will see why it fails
            continue
    return modules, msgspec.json.decode(next(lines), type=Order)
