"""The first lines of `tako dev`: what it has found, in at most ten lines, and how to begin."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tako_cli import output

if TYPE_CHECKING:
    from rich.text import Text

    from tako_runtime.manifest import Declared

#: How many lines the workflows take.
_LISTED = 4

#: Where the words of a fact begin.
_INDENT = 10


class Found(NamedTuple):
    """What is there. `secrets` are those that are set, `missing` those that ought to be; `left` are the runs that have
    not ended, by their state."""

    app: str
    url: str | None
    root: Path
    folder: str
    store: Path
    workflows: "Sequence[Declared]"
    secrets: Sequence[str]
    missing: Sequence[str]
    left: Mapping[str, int]
    keys: bool


def welcome(found: Found) -> "list[Text]":
    flows = found.workflows
    first = output.styled("tako dev  ", "dim").append(found.app, "bold")
    if found.url is not None:
        first.append(f"  {found.url}", "cyan")
    shown = flows if len(flows) <= _LISTED else flows[: _LISTED - 1]
    width = max((len(flow.name) for flow in shown), default=0)
    lines = [first, *(_workflow(flow, width) for flow in shown)]
    if len(flows) > len(shown):
        lines.append(output.styled(f"  and {len(flows) - len(shown)} more: tako workflows ls", "dim"))
    if not flows:
        lines.append(output.styled(f"  no workflow is declared in {found.folder}/ yet", "yellow"))
    store = found.store.relative_to(found.root) if found.store.is_relative_to(found.root) else found.store
    lines.append(_fact("store", str(store)))
    if found.secrets or found.missing:
        lines.append(_fact("secrets", ", ".join(found.secrets)))
        if found.missing:
            lines[-1].append(f"{'; ' if found.secrets else ''}missing: {', '.join(found.missing)}", "yellow not dim")
    if found.left:
        lines.append(_fact("left", resume(found.left)))
    if flows:
        how = how_to_start(flows, found.root)
        first_of, *rest = textwrap.wrap(
            f"press s, or: {how}" if found.keys else how, max(output.width() - _INDENT, 20),
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        lines += [_fact("start", first_of), *(output.styled(" " * _INDENT + line) for line in rest)]
    for line in lines:
        line.truncate(output.width(), overflow="ellipsis" if output.can_show("…") else "crop")
    return lines


def resume(left: Mapping[str, int]) -> str:
    """What becomes of live runs, and how to be rid of them."""
    count = sum(left.values())
    return f"{count} run{'s resume' if count != 1 else ' resumes'}; --fresh to start empty ({spelled(left)})"


def spelled(left: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(left.items()))


def how_to_start(flows: "Sequence[Declared]", root: Path) -> str:
    """The command that starts a run of the workflow that nothing else would start."""
    flow = next((flow for flow in flows if not flow.schedule), flows[0])
    if flow.payload in (None, "None", "NoneType"):
        return f"tako runs start {flow.name}"
    file = payload_file(flow, root)
    return f"tako runs start {flow.name} --payload {f'@{file.name}' if file else 'JSON'}"


def payload_file(flow: "Declared", root: Path) -> Path | None:
    """The project's own example of a payload, if there is one: the file that has the name of its type, `order.json` for
    an `Order`."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in (flow.payload or "").rpartition(".")[2]).lstrip("_")
    file = root / f"{name}.json"
    return file if name.isidentifier() and file.is_file() else None


def _workflow(flow: "Declared", width: int) -> "Text":
    line = output.styled("  ").append(output.one_line(flow.name), "bold")
    if flow.schedule or flow.group != "default":
        line.append(" " * (width - len(flow.name)))
    if flow.schedule:
        line.append(f"  {output.one_line(flow.schedule)} {flow.timezone or 'UTC'}", "cyan")
    if flow.group != "default":
        line.append(f"  group {output.one_line(flow.group)}", "dim")
    return line


def _fact(name: str, words: str) -> "Text":
    return output.styled(f"  {name:<{_INDENT - 2}}", "dim").append(words, "default not dim")
