"""`tako runs tail`: events as they come, as the lines of one log."""

from collections.abc import AsyncIterator
from pathlib import Path

from tako_cli import output
from tako_cli.dev.lines import Lines
from tako_runtime.feed import Event


async def show_events(events: AsyncIterator[Event], root: Path, *, as_json: bool) -> None:
    """All of them. Raises `BrokenPipeError` once nobody reads."""
    unread = []
    lines = Lines(root, [], [], as_json=as_json, lost=lambda: unread.append(True))
    async for event in events:
        if event["event"].startswith("tail.") and not as_json:
            output.note(event["message"])
        else:
            lines.show(event["source"], event)
        if unread:
            raise BrokenPipeError
