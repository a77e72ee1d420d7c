"""Which live runs a release would not know any more, or not know all of: asked before the switch to it.

A run is *orphaned* where its workflow is not declared: it is kept, and no worker takes it. It has *strange* steps where
it has finished some that the code does not name any more: on its next pass they are passed over, and what has taken
their place runs.

The names in the code are read off its source: the text in `step.run("charge", …)`, and the fixed parts of an f-string.
A name that is computed cannot be read, so a file with one may name anything, and nothing is said of its workflows'
steps; `unread` counts the runs of which this holds.

A run is *elsewhere* where its workflow has become local, or is so no longer: it ends in the store in which it was
begun, and new ones go into the other.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tako_runtime.control import Control
from tako_runtime.manifest import Declared, Manifest

#: So many runs are named that have strange steps; of the others it is said how many there are.
MOST = 1_000

#: The methods of a step whose first argument is a name.
_NAMING = {"run": 0, "wait_for": 0, "sleep": None, "sleep_until": None}


@dataclass
class Names:
    """The names of steps in some code: patterns that a name may match; `open` where one is computed."""

    patterns: set[str] = field(default_factory=set)
    open: bool = False

    def has(self, name: str) -> bool:
        return self._like.fullmatch(name) is not None

    @cached_property
    def _like(self) -> "re.Pattern[str]":
        return re.compile("|".join(sorted(self.patterns)) or "(?!)", re.DOTALL)

    def __or__(self, other: "Names") -> "Names":
        return Names(self.patterns | other.patterns, self.open or other.open)


def unfit(control: Control, manifest: Manifest, root: Path) -> dict[str, Any]:
    """The live runs that this code does not fit, for programs."""
    named = step_names(root, manifest.workflows)
    local = {flow.name: flow.local for flow in manifest.workflows}
    orphaned: dict[str, int] = {}
    elsewhere: dict[str, int] = {}
    strange: list[dict[str, Any]] = []
    unread = more = 0
    for run, own in control.live():
        flow = run.workflow
        if flow not in named:
            orphaned[flow] = orphaned.get(flow, 0) + 1
            continue
        if control.splits and local[flow] != own:
            elsewhere[flow] = elsewhere.get(flow, 0) + 1
        mine = dict.fromkeys(name.partition("#")[0] for name in run.finished)
        unknown = [name for name in mine if not named[flow].has(name)]
        if unknown and named[flow].open:
            unread += 1
        elif unknown and len(strange) < MOST:
            strange.append({"id": run.id, "workflow": flow, "steps": unknown})
        elif unknown:
            more += 1
    return {"orphaned": orphaned, "elsewhere": elsewhere, "strange": strange, "more": more, "unread": unread}


def step_names(root: Path, workflows: Sequence[Declared]) -> Mapping[str, Names]:
    """For each workflow the names that its steps may have: those in its handler, and those in all code that is not
    another one's handler, since a handler may hand its step on."""
    handlers: dict[str, Names] = {flow.name: Names() for flow in workflows}
    shared = Names()
    for file in sorted(root.rglob("*.py")):
        if any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        places = {flow.line: flow.name for flow in workflows if _same(flow.file, file, root)}
        for flow, node in _split(tree, places):
            found = _names(node)
            if flow is None:
                shared |= found
            else:
                handlers[flow] |= found
    return {flow: names | shared for flow, names in handlers.items()}


def _same(declared: str, file: Path, root: Path) -> bool:
    return bool(declared) and (root / declared) == file


def _split(tree: ast.Module, places: Mapping[int, str]) -> Iterator[tuple[str | None, ast.AST]]:
    """The tree in parts: each handler, and what is left. A function's first line is that of its first decorator."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}
            yield next((places[line] for line in lines if line in places), None), node
        else:
            yield None, node


def _names(tree: ast.AST) -> Names:
    found = Names()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _NAMING):
            continue
        at = _NAMING[node.func.attr]
        given = next((word.value for word in node.keywords if word.arg == "name"), None)
        if given is None and at is not None and len(node.args) > at:
            given = node.args[at]
        if given is None:
            continue
        pattern = _pattern(given)
        if pattern is not None:
            found.patterns.add(pattern)
        elif _of_a_step(node.func.value):
            found.open = True
    return found


def _pattern(given: ast.expr) -> str | None:
    """What the name may look like; None where only running the code would tell."""
    if isinstance(given, ast.Constant) and isinstance(given.value, str):
        return re.escape(given.value)
    if isinstance(given, ast.JoinedStr):
        fixed = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in given.values]
        return "".join(fixed)
    return None


def _of_a_step(value: ast.expr) -> bool:
    """Whether it looks like a step's method: `asyncio.run(main())` is none."""
    name = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
    return "step" in name.lower()
