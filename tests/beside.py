"""A project with local workflows, and what is in both stores of a server whose environment is on a shared one."""

from pathlib import Path
from typing import Any

from conftest import until

from tako_runtime.control import Control
from tako_runtime.store import Home, Local
from tako_runtime.store.commit import StoreThread

FLOWS = """
import asyncio, os, pathlib
from tako_runtime import Step, signal, workflow

def here() -> str:
    return os.environ["TAKO_DATA_DIR"]

@workflow("shared")
async def shared(payload: str, step: Step) -> str:
    if payload == "starts local":
        await warm.enqueue("from shared", unique_key="k")
    return here()

@workflow("warm", local=True)
async def warm(payload: str, step: Step) -> str:
    if payload == "starts shared":
        await shared.enqueue_many(["from local"])
    return here()

@workflow("holds", local=True, retries=4)
async def holds(payload: str, step: Step) -> str:
    async def body() -> str:
        while not pathlib.Path(payload).exists():
            await asyncio.sleep(0.02)
        return here()
    return await step.run("hold", body)

@workflow("waits", local=True)
async def waits(payload: str, step: Step) -> object:
    return await step.wait_for(payload)

@workflow("sends", local=True)
async def sends(payload: str, step: Step) -> int:
    return await signal(payload, here())

@workflow("asks")
async def asks(payload: str, step: Step) -> object:
    return await step.wait_for(payload)
"""

TICKS = """
@workflow("ticks", local=True, schedule="* * * * * *")
async def ticks(step: Step) -> str:
    return here()
"""

TOML = 'name = "shop"\n[workflows]\nlease = "2s"\nidle_timeout = "60s"\n'


def make(root: Path, flows: str, toml: str = TOML) -> Path:
    (root / "workflows").mkdir(parents=True, exist_ok=True)
    (root / "workflows" / "flows.py").write_text(flows)
    (root / "tako.toml").write_text(toml)
    return root


class Stores:
    """Both stores of a server."""

    def __init__(self, opened: StoreThread, home: Home) -> None:
        self.home, self.local = home, Local(home)
        self.control = Control(opened)
        self.shared = opened

    def runs(self, workflow: str | None = None) -> dict[str, list[dict[str, Any]]]:
        """What is in the shared store, and what in the server's own."""
        there = self.local.there()
        own = Control(there).list_runs(workflow=workflow, limit=1_000) if there is not None else []
        return {"shared": self.control.list_runs(workflow=workflow, limit=1_000), "local": own}

    def ended(self, workflow: str, count: int = 1) -> list[dict[str, Any]]:
        """The local runs of that workflow, once so many have succeeded."""
        return until(lambda: len(found := self.succeeded(workflow)) >= count and found)

    def succeeded(self, workflow: str) -> list[dict[str, Any]]:
        return [run for run in self.runs(workflow)["local"] if run["status"] == "succeeded"]
