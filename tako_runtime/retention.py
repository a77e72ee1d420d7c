"""Old ended runs go, in batches so small that no writer waits long for the lock; live ones never."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from tako_runtime import clock
from tako_runtime.run import Status
from tako_runtime.store.base import Prune
from tako_runtime.store.commit import StoreThread

#: How many ended runs one transaction looks at.
BATCH = 200


async def prune(
    store: StoreThread,
    before: int,
    *,
    group: str | None = None,
    workflow: str | None = None,
    statuses: Sequence[Status] | None = None,
    pause: int = 0,
) -> AsyncIterator[int]:
    """Delete the runs that ended before `before`, the oldest first, and give the file's free pages back. Yields how
    many went with each batch; between two it lets go of the lock, and waits for `pause`."""
    after: tuple[int, int] | None = (0, 0)
    while after is not None:
        batch = Prune(before=before, limit=BATCH, group=group, workflow=workflow, statuses=statuses, after=after)
        pruned = await store.do(batch)
        after = pruned.after
        yield pruned.count
        await asyncio.sleep(pause / clock.SECOND)
