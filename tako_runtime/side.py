"""One store, as one machine serves it: the workers of its runs, its schedules, its old runs.

A server has one side, for the store of its environment. Where servers share that and a workflow is local, there is a
second one, for the store of this machine's own, which differs in nothing. `local` of a workflow says only into which
store its new runs go, and which side its schedule fires on: workers take whatever is in their side's store, so that a
run ends where it was begun, though its workflow has meanwhile become local, or ceased to be.
"""

import asyncio
from typing import Any

import msgspec

from tako_runtime.courier import Courier
from tako_runtime.manifest import Manifest
from tako_runtime.retention import Retention
from tako_runtime.store.commit import StoreThread
from tako_runtime.supervisor import Supervisor
from tako_runtime.ticker import Cron


class Side:
    """The parts that serve `store`, until stopped."""

    def __init__(
        self,
        store: StoreThread,
        supervisor: Supervisor,
        cron: Cron,
        retention: Retention,
        courier: Courier | None = None,
    ) -> None:
        self.store, self.supervisor, self.cron = store, supervisor, cron
        self._retention, self._courier = retention, courier

    async def take(self, manifest: Manifest, scheduled: Manifest) -> None:
        """Go by this manifest from now on; `scheduled` is what is left of it where only those workflows are in it
        whose schedules fire here."""
        self.supervisor.declare(manifest)
        await self.cron.declare(scheduled)

    async def run(self, *, firing: bool = True) -> None:
        """Until `stop()`; then drain the workers. Without `firing` no schedule fires and no old run goes.

        If one of the parts cannot go on, all end, and what it failed of is raised."""
        loop = asyncio.get_running_loop()
        endless = [part for part in (self._retention if firing else None, self._courier) if part is not None]
        supervising = loop.create_task(self.supervisor.run())
        others: list[asyncio.Task[Any]] = [loop.create_task(part.run()) for part in endless]
        if firing:
            others.append(loop.create_task(self.cron.run()))
        try:
            await asyncio.wait([supervising, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.stop()
            for task in others[: len(endless)]:
                task.cancel()
            await asyncio.gather(supervising, *others, return_exceptions=True)
        for task in (supervising, *others):
            if not task.cancelled():
                task.result()

    def stop(self, *, succeeded: bool = False) -> None:
        """Fire nothing more, claim nothing more, drain (`Supervisor.stop`). Call it in the event loop."""
        self.cron.stop()
        self.supervisor.stop(succeeded=succeeded)


def scheduled_on(manifest: Manifest, *, local: bool) -> Manifest:
    """What is left of it where only local workflows are in it, or only all others."""
    return msgspec.structs.replace(
        manifest, workflows=tuple(flow for flow in manifest.workflows if flow.local == local)
    )
