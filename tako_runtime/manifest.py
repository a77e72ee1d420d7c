"""What `workflows/` declares: discovery, and the manifest as JSON.

The manifest is read by importing the project's workflows in a short-lived process, so that an import error stops a
deploy or shows up in the log, and never takes a supervisor down. One bad file does not hide the others.
"""

import importlib
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock
from tako_runtime.errors import ConfigError, InvalidValue, TakoError
from tako_runtime.secrets import VARIABLE, Mask, envelope
from tako_runtime.workflow import Workflow, registry

#: How long importing the workflows may take, in seconds: a module that starts a server at import would take for ever.
PATIENCE = 60


class Declared(msgspec.Struct, frozen=True):
    """One workflow as the manifest has it. Durations are microseconds."""

    name: str
    group: str
    retries: int
    backoff_base: int
    backoff_max: int
    payload: str | None
    file: str
    line: int
    doc: str = ""
    schedule: str | None = None
    timezone: str | None = None
    catchup: str = "latest"
    overlap: str = "allow"
    timeout: int | None = None
    blocking: bool = False


class Mistake(msgspec.Struct, frozen=True):
    """A file that could not be imported: where in the user's code, and why."""

    file: str
    line: int
    message: str
    traceback: str


class Manifest(msgspec.Struct, frozen=True):
    workflows: tuple[Declared, ...]
    mistakes: tuple[Mistake, ...] = ()


def discover(root: Path, folder: str) -> list[Mistake]:
    """Import every module of `root/folder`, so that `registry` has its workflows; what could not be imported.

    A file is the module that its path names (`workflows/fulfill_order.py` is `workflows.fulfill_order`), as the app
    imports it too. Names that begin with `_` are left to be imported by others.
    """
    place = root / folder
    if not place.is_dir():
        raise ConfigError(
            f"there is no folder {folder!r} in {root}", hint="Put your workflows there, or set dir in [workflows]."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    mistakes = []
    for file in sorted(place.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if any(part.startswith("_") or not part.isidentifier() for part in parts[len(Path(folder).parts) :]):
            continue
        try:
            importlib.import_module(".".join(parts))
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- a module of the user's may raise anything
            mistakes.append(_mistake(error, file, root))
    return mistakes


def manifest(root: Path, folder: str) -> Manifest:
    """The manifest of the project in `root`, with the mistakes of the files that could not be imported."""
    mistakes = discover(root, folder)
    declared = [_declared(flow) for _, flow in sorted(registry.items())]
    for flow in declared:
        if flow.schedule is not None:
            from tako_runtime.cron import Schedule  # costs its import only where there is a schedule

            try:
                Schedule.parse(flow.schedule, flow.timezone)
            except InvalidValue as error:
                hint = f" ({error.hint})" if error.hint else ""
                mistakes.append(Mistake(flow.file, flow.line, f"schedule of {flow.name!r}: {error}{hint}", ""))
    return Manifest(tuple(declared), tuple(mistakes))


def read(root: Path, folder: str, environment: Mapping[str, str], secrets: Mapping[str, str] | None = None) -> Manifest:
    """The manifest, read in a process of its own, so that user code cannot take this one down. Raises `ConfigError`
    where it cannot be read at all. `secrets` are for modules that read them at import."""
    words = [sys.executable, "-m", "tako_runtime", "manifest", "--dir", folder]
    try:
        done = subprocess.run(
            words, cwd=root, env={**environment, VARIABLE: "0"}, input=envelope(secrets or {}), capture_output=True,
            check=False, timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"importing {root / folder} takes more than {PATIENCE} s",
            hint="Move what takes so long out of the modules' top level: it runs at each import.",
        ) from None
    try:
        return msgspec.json.decode(done.stdout, type=Manifest)
    except msgspec.MsgspecError:
        said = Mask(secrets or {}).text(done.stderr.decode(errors="replace").strip(), "what the manifest says")
        raise ConfigError(said or f"reading {root / folder} ended with exit code {done.returncode}") from None


def _declared(flow: Workflow[..., Any]) -> Declared:
    code = getattr(flow.handler, "__code__", None)
    annotation = flow.payload_type
    return Declared(
        name=flow.name,
        group=flow.group,
        retries=flow.retries,
        backoff_base=flow.backoff.base_micros,
        backoff_max=flow.backoff.max_micros,
        payload=getattr(annotation, "__qualname__", str(annotation)) if flow.takes_payload else None,
        file=code.co_filename if code else "",
        line=code.co_firstlineno if code else 0,
        doc=(flow.__doc__ or "").strip().split("\n")[0],
        schedule=flow.schedule,
        timezone=flow.timezone,
        catchup=flow.catchup,
        overlap=flow.overlap,
        timeout=flow.timeout,
        blocking=flow.blocking,
    )


def _mistake(error: BaseException, file: Path, root: Path) -> Mistake:
    """The last line of the user's own code that the error passed through; for a syntax error, where it is."""
    place, line = file, 0
    for frame, number in traceback.walk_tb(error.__traceback__):
        if Path(frame.f_code.co_filename).is_relative_to(root):
            place, line = Path(frame.f_code.co_filename), number
    if isinstance(error, SyntaxError) and error.filename:
        place, line = Path(error.filename), error.lineno or 0
    report = traceback.TracebackException.from_exception(error)
    machinery = ("<frozen importlib", importlib.__file__, __file__)
    report.stack = traceback.StackSummary.from_list([f for f in report.stack if not f.filename.startswith(machinery)])
    hint = f" ({error.hint})" if isinstance(error, TakoError) and error.hint else ""
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    message = f"{type(error).__name__}: {said}{hint}"
    return Mistake(str(place), line, message, "".join(report.format()).rstrip())


def spelled(flow: Declared) -> dict[str, Any]:
    """A declared workflow for programs: durations in seconds."""
    shown = msgspec.to_builtins(flow)
    for name in ("backoff_base", "backoff_max", "timeout"):
        if shown[name] is not None:
            shown[name] = shown[name] / clock.SECOND
    return dict(shown)
