"""The screens of the documentation: `make screens`.

A scaffolded project, a real `tako dev` at a terminal of 100 columns, the keys of a person, and what the terminal shows
as SVG in `docs/`. `tests/test_screens.py` makes them again and compares what does not change with time.
"""

import html
import io
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from cli import done
from rich.console import Console
from rich.style import Style
from rich.text import Text
from terminal import Terminal, at_terminal

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS, ROWS = 100, 35

_COLOURS = {"brown": "yellow", "default": None}


def main(folder: Path = DOCS) -> None:
    """Make both."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tako-screens-") as temporary:
        done("init", "shop", "--yes", cwd=Path(temporary))
        shop = Path(temporary) / "shop"
        with at_terminal("dev", cwd=shop, columns=COLUMNS, rows=ROWS) as dev:
            order(dev)
            draw(dev, folder / "dev.svg")
            mend(dev, shop / "workflows" / "fulfill_order.py")
            draw(dev, folder / "dev-mend.svg", since="step ship done")
            dev.press("\x1b")
            dev.wait_for("as the last time", gone=True)
            dev.press("q")
            dev.ended()


def order(dev: Terminal) -> None:
    """An order is started, waits for its approval, gets it, and packs."""
    dev.wait_for_foot("for keys")
    dev.wait_for("group default started")
    dev.press("s2")
    dev.wait_for("payload of fulfill-order, from order.json")
    dev.press("\r")
    dev.wait_for("waits for approval:42")
    dev.wait_for_foot("1 parked")
    dev.press("w1")
    dev.wait_for("payload of signal approval:42")
    dev.press('\x15{"approved": true}\r')
    for step in ("reserve-stock", "notify-warehouse", "send-receipt"):
        dev.wait_for(f"step {step} done")
    dev.wait_for_foot("1 running")


def mend(dev: Terminal, file: Path) -> None:
    """A file is broken, mended, and the next order is about to be started."""
    dev.wait_for("succeeded in")
    good = file.read_text()
    save(file, good.replace("return Receipt(payload.id,", "return Receipt(payload.id"))
    dev.wait_for("the code as it was before goes on")
    save(file, good)
    dev.wait_for("the new code is at work")
    dev.wait_for_foot("0 running .* reloaded")
    dev.press("s2")
    dev.wait_for("as the last time")


def save(file: Path, text: str) -> None:
    """As an editor does: nobody sees half of it."""
    fresh = file.with_suffix(".py~")
    fresh.write_text(text)
    fresh.replace(file)


def draw(dev: Terminal, file: Path, since: str = "") -> None:
    """What the terminal shows, as a picture; the rows from the one on that has these words."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    first = next(row for row, words in enumerate(dev.rows) if since in words)
    for row in range(first, len(dev.rows)):
        console.print(_row(dev.screen.buffer[row]), overflow="crop", no_wrap=True)
    file.write_text(console.export_svg(title="tako dev", unique_id=file.stem), "utf-8")


def _row(cells: Any) -> Text:
    text = Text()
    for style, group in groupby((cells[x] for x in range(COLUMNS)), _style):
        text.append("".join(cell.data for cell in group), style)
    return text


def _style(cell: Any) -> Style:
    return Style(color=_colour(cell.fg), bgcolor=_colour(cell.bg), bold=cell.bold, dim=cell.blink, reverse=cell.reverse)


def _colour(name: str) -> str | None:
    return _COLOURS.get(name, name.replace("bright", "bright_"))


def steady(svg: str) -> list[str]:
    """The lines of a picture without what changes with time, in an order of their own."""
    rows: dict[str, str] = {}
    for y, words in re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        rows[y] = f"{rows.get(y, '')} {html.unescape(words)}"
    changing = (
        r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d(\.\d+)?|\b[0-9a-f]{8}\b|[\d.]+(ms|s|m)\b|\bch_\w+|\d+ (queued|running|parked)"
    )
    return sorted(re.sub(r"\s+", " ", re.sub(changing, "_", row)).strip() for row in rows.values())


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
