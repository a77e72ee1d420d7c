"""`tako runs tail`: events as they come, as the lines of one log."""

from pathlib import Path
from typing import TYPE_CHECKING

from tako_cli import output
from tako_cli.dev.lines import Lines
from tako_runtime.tail import tail

if TYPE_CHECKING:
    from tako_runtime.store import Home
    from tako_runtime.store.commit import StoreThread


async def show_events(store: "StoreThread", home: "Home", run: str | None, root: Path, *, as_json: bool) -> None:
    """Of one run until it has ended, or of all of them for ever. Raises `BrokenPipeError` once nobody reads."""
    unread = []
    lines = Lines(root, [], [], as_json=as_json, lost=lambda: unread.append(True))
    async for event in tail(store, home.app_dir, run):
        if event["event"].startswith("tail.") and not as_json:
            output.note(event["message"])
        else:
            lines.show(event["source"], event)
        if unread:
            raise BrokenPipeError
