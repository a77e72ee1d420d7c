"""Whether a handler's tasks can still move, or all of them wait for what only time or a signal brings.

A run parks when every branch of its handler sleeps or waits. A branch that awaits something of its own between two
steps, an answer over the network, say, can still move, and must not be cut off. asyncio does not say what a task waits
for; so this looks at the future that a task is suspended on, and at the place in its code where it is.
"""

import asyncio
import asyncio.taskgroups
import inspect
from collections.abc import Collection
from typing import Any

#: Where a task waits for those that it has made itself. A lock, an event or a queue is no such place: another run, a
#: timer or a thread may open it.
_MEETING_PLACES = {asyncio.taskgroups.__file__}

Future = asyncio.Future[Any]
Tasks = Collection[asyncio.Task[Any]]


def at_standstill(tasks: Tasks, parked: Collection[Future]) -> bool:
    """Whether no task of `tasks` moves before one of the futures `parked` is resolved.

    A task that awaits anything unknown counts as one that can move: then its run keeps its slot, and nothing is late.
    """
    return all(task.done() or _stands(task, tasks, parked) for task in tasks)


def _stands(task: asyncio.Task[Any], tasks: Tasks, parked: Collection[Future]) -> bool:
    awaited: Future | None = getattr(task, "_fut_waiter", None)  # None: it runs, or is about to
    if awaited is None or awaited.done():
        return False
    return _held(awaited, tasks, parked) or _meets(task, tasks, parked)


def _held(future: Future, tasks: Tasks, parked: Collection[Future]) -> bool:
    """Whether `future` waits for these tasks: it is one of them, or `gather`s them."""
    if future in parked or future in tasks:
        return True
    left = [child for child in getattr(future, "_children", ()) if not child.done()]
    return bool(left) and all(_held(child, tasks, parked) for child in left)


def _meets(task: asyncio.Task[Any], tasks: Tasks, parked: Collection[Future]) -> bool:
    """Whether it is suspended at a meeting place, and has set itself no time limit there."""
    at: Any = task.get_coro()
    while inspect.iscoroutine(inner := getattr(at, "cr_await", None)):
        at = inner
    frame = getattr(at, "cr_frame", None)
    if frame is None:
        return False
    code = frame.f_code
    if code.co_filename == asyncio.tasks.__file__ and code.co_name == "_wait":
        left = [future for future in frame.f_locals.get("fs", ()) if not future.done()]
        return frame.f_locals.get("timeout") is None and all(_held(future, tasks, parked) for future in left)
    return code.co_filename in _MEETING_PLACES
