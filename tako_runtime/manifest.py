"""What `workflows/` declares: discovery, and the manifest as JSON.

The manifest is read by importing the project's workflows in a short-lived process, so that an import error stops a
deploy or shows up in the log, and never takes a supervisor down. One bad file does not hide the others.
"""

import contextlib
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from tako_runtime import clock, codec
from tako_runtime.errors import ConfigError, InvalidValue, TakoError
from tako_runtime.example import example
from tako_runtime.masking import Mask
from tako_runtime.process import how
from tako_runtime.secrets import VARIABLE, envelope
from tako_runtime.workflow import Workflow, declaring_once, registry

if TYPE_CHECKING:
    from tako_runtime.config import Config

#: How long importing one file may take, in seconds: one that loops or starts a server would take for ever.
IMPORT_LIMIT = 30.0

#: How long reading the whole manifest may take, in seconds, where a file hangs so that its own limit cannot end it.
PATIENCE = 75


class Declared(msgspec.Struct, frozen=True):
    """One workflow as the manifest has it. Durations are microseconds; `example` is the JSON text of a payload that
    fits its type, "" where none could be made."""

    name: str
    group: str
    retries: int
    backoff_base: int
    backoff_max: int
    payload: str | None
    file: str
    line: int
    signature: str = ""
    doc: str = ""
    schedule: str | None = None
    timezone: str | None = None
    catchup: str = "latest"
    overlap: str = "allow"
    timeout: int | None = None
    blocking: bool = False
    example: str = ""
    local: bool = False


class Mistake(msgspec.Struct, frozen=True):
    """What is wrong with a file (`message`: "cannot be imported: ...") or with a workflow in it, and where in the
    user's code."""

    file: str
    line: int
    message: str
    traceback: str


class Manifest(msgspec.Struct, frozen=True):
    """What the workflows declare, and what is wrong with them. `files` are those that their code is made of, the
    project's own, as they are called in it."""

    workflows: tuple[Declared, ...]
    mistakes: tuple[Mistake, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The groups that workflows name, each with its workflows."""
        found: dict[str, tuple[str, ...]] = {}
        for flow in self.workflows:
            found[flow.group] = (*found.get(flow.group, ()), flow.name)
        return found


def discover(
    root: Path,
    folder: str,
    limit: float = IMPORT_LIMIT,
    *,
    without: Container[str] = (),
    told: Callable[[str], object] = lambda _: None,
) -> Iterator[Mistake]:
    """Import every module of `root/folder` but those `without`, so that `registry` has its workflows; what could not be
    imported, as it turns up. A file that takes longer than `limit` seconds is one that could not; one that ends the
    process is the last that was `told` of. To be called in the main thread.

    A file is the module that its path names (`workflows/fulfill_order.py` is `workflows.fulfill_order`), as the app
    imports it too. Names that begin with `_` are left to be imported by others, hidden ones alone.
    """
    place = root / folder
    if not place.is_dir():
        raise ConfigError(
            f"there is no folder {folder!r} in {root}", hint="Put your workflows there, or set dir in [workflows]."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    unread: list[OSError] = []
    for file in _modules(place, unread.append):
        parts = file.relative_to(root).with_suffix("").parts
        inner = parts[len(Path(folder).parts) :]
        if not all(part.isidentifier() for part in inner):
            why = "cannot be imported: a module's name, and that of its folders, has letters, digits and '_' only"
            yield Mistake(str(file).encode(errors="backslashreplace").decode(), 0, why, "")
            continue
        if str(file) in without:
            continue
        told(str(file))
        try:
            with declaring_once(), _within(limit):
                importlib.import_module(".".join(parts))
        except (Exception, SystemExit, _TooSlow) as error:  # noqa: BLE001 -- a module of the user's may raise anything
            yield _mistake(error, file, root)
    for one in unread:
        if Path(one.filename) == place:
            raise ConfigError(f"{place} cannot be read: {one.strerror}", hint="Look at the folder's owner and mode.")
        yield Mistake(str(one.filename), 0, f"cannot be read: {one.strerror}", "")


def _modules(place: Path, unread: Callable[[OSError], None]) -> list[Path]:
    """The files to be imported, in order."""
    found = []
    for folder, folders, names in os.walk(place, onerror=unread):
        folders[:] = [name for name in folders if not name.startswith(("_", "."))]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(("_", "."))]
    return sorted(found)


def declares(root: Path, mistakes: list[Mistake], config: "Config | None") -> Manifest:
    """The manifest of what this process has discovered, with these mistakes."""
    declared = [_declared(flow) for _, flow in sorted(registry.items())]
    for flow in declared:
        wrong = [_wrong_schedule(flow), _wrong_group(flow.group, config) if config else ""]
        mistakes = mistakes + [
            Mistake(flow.file, flow.line, f"workflow {flow.name!r}: {why}", "") for why in wrong if why
        ]
    own = {str(file.relative_to(root)) for file, _ in imported(root) if file.suffix == ".py"}
    files = {file.encode(errors="backslashreplace").decode() for file in own}
    return Manifest(tuple(declared), tuple(mistakes), tuple(sorted(files)))


def imported(root: Path) -> Iterator[tuple[Path, str]]:
    """The modules that this process has imported and that are the project's own: each one's file, or folder, and
    name."""
    for name, module in list(sys.modules.items()):
        file: str | None = getattr(module, "__file__", None)
        for place in [file] if file else [*getattr(module, "__path__", ())]:
            if is_own(Path(place), root):
                yield Path(place), name


def is_own(file: Path, root: Path) -> bool:
    """Whether a file is the project's own, and not of a package that is installed, be it in a folder of the project."""
    return file.is_relative_to(root) and not file.is_relative_to(sys.prefix) and "site-packages" not in file.parts


def fingerprint(root: Path, folder: str) -> frozenset[tuple[str, int, int]]:
    """Changes with every file of the workflows that is made, edited or removed."""
    found = set()
    for file in (root / folder).rglob("*.py"):
        try:
            seen = file.stat()
        except OSError:  # removed meanwhile
            continue
        found.add((str(file), seen.st_mtime_ns, seen.st_size))
    return frozenset(found)


def read(root: Path, folder: str, environment: Mapping[str, str], secrets: Mapping[str, str] | None = None) -> Manifest:
    """The manifest, read in a process of its own, so that user code cannot take this one down. Raises `ConfigError`
    where it cannot be read at all; a file whose import ends that process is a mistake as any other. `secrets` are for
    modules that read them at import."""
    words = [sys.executable, "-m", "tako_runtime", "manifest", "--dir", folder, "--telling"]
    fatal: list[Mistake] = []
    while True:
        without = [f"--without={one.file}" for one in fatal]
        try:
            done = subprocess.run(
                words + without, cwd=root, env={**environment, VARIABLE: "0"}, input=envelope(secrets or {}),
                capture_output=True, check=False, timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"importing {root / folder} takes more than {PATIENCE} s",
                hint="Move what takes so long out of the modules' top level: it runs at each import.",
            ) from None
        last = done.stdout.removesuffix(b"\n").rpartition(b"\n")[2]
        try:
            found = msgspec.json.decode(last, type=Manifest)
            return msgspec.structs.replace(found, mistakes=(*fatal, *found.mistakes))
        except msgspec.MsgspecError:
            said = Mask(secrets or {}).text(done.stderr.decode(errors="replace").strip(), "what the manifest says")
            file = os.fsdecode(last)
            if not file or any(one.file == file for one in fatal):
                told = said or f"reading {root / folder} ended with {how(done.returncode)}"
                raise ConfigError(told) from None
            message = f"cannot be imported: it ends the process that does ({how(done.returncode)})"
            fatal.append(Mistake(file, 0, ": ".join([message, *said.splitlines()[-1:]]), said))


class _TooSlow(BaseException):
    """An import has run past its limit. No `Exception`: a module's own `except` must not swallow it."""


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise `_TooSlow` in the main thread, wherever it is by then, and again each second should that be swallowed."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TooSlow(f"its import takes more than {seconds:g} s: move what takes so long out of the top level")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _wrong_schedule(flow: Declared) -> str:
    if flow.schedule is None:
        return ""
    from tako_runtime.cron import Schedule  # costs its import only where there is a schedule

    try:
        Schedule.parse(flow.schedule, flow.timezone)
    except InvalidValue as error:
        return f"{error} ({error.hint})" if error.hint else str(error)
    return ""


def _wrong_group(group: str, config: "Config") -> str:
    """Why a group is one that cannot be, or that is hardly meant. Any other name is a new group, which inherits
    [workflows]."""
    from tako_runtime.config import Workflows, settings  # a worker does without

    if group in settings(Workflows):
        return f"group {group!r} has the name of a setting of [workflows]: no file could configure it"
    known = {name for server in (None, *config.servers) for name in config.group_names(server)}
    near = sorted(name for name in known if _a_slip_away(group, name))
    if group in known or not near:
        return ""
    return f"unknown group {group!r} (Did you mean {near[0]!r}? If it is another one, add [workflows.{group}].)"


def _a_slip_away(name: str, known: str) -> bool:
    """Whether one name is the other with one letter more, less, or changed, or two neighbours swapped. Digits tell
    lanes apart (`gpu-1`, `gpu-2`), and so do the letters of very short names.

    >>> _a_slip_away("emial", "email"), _a_slip_away("emails", "email"), _a_slip_away("gpu-2", "gpu-1")
    (True, True, False)
    """
    if min(len(name), len(known)) < 4:
        return False
    while name and known and name[0] == known[0]:
        name, known = name[1:], known[1:]
    while name and known and name[-1] == known[-1]:
        name, known = name[:-1], known[:-1]
    swapped = len(name) == 2 and name == known[::-1]
    return (swapped or max(len(name), len(known)) == 1) and not re.search(r"\d", name + known)


def _declared(flow: Workflow[..., Any]) -> Declared:
    code = getattr(inspect.unwrap(flow.handler), "__code__", None)
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
        signature=_signature(flow.handler),
        doc=(flow.__doc__ or "").strip().split("\n")[0],
        schedule=flow.schedule,
        timezone=flow.timezone,
        catchup=flow.catchup,
        overlap=flow.overlap,
        timeout=flow.timeout,
        blocking=flow.blocking,
        example=example(annotation) if flow.takes_payload else "null",
        local=flow.local,
    )


def _signature(handler: Callable[..., Any]) -> str:
    """As it is written, with its annotations resolved: `(payload: workflows.orders.Order, step: ...) -> str`."""
    written = inspect.signature(handler)
    found = codec.annotations(handler)
    parameters = [p.replace(annotation=found.get(p.name, p.annotation)) for p in written.parameters.values()]
    answer = found.get("return", written.return_annotation)
    return str(written.replace(parameters=parameters, return_annotation=answer))


def _mistake(error: BaseException, file: Path, root: Path) -> Mistake:
    """The last line of the user's own code that the error passed through; for a syntax error, where it is."""
    place, line = file, 0
    for frame, number in traceback.walk_tb(error.__traceback__):
        if Path(frame.f_code.co_filename).is_relative_to(root):
            place, line = Path(frame.f_code.co_filename), number
    if isinstance(error, SyntaxError) and error.filename:
        place, line = Path(error.filename), error.lineno or 0
    report = traceback.TracebackException.from_exception(error)
    machinery = ("<frozen importlib", importlib.__file__, __file__, contextlib.__file__)
    report.stack = traceback.StackSummary.from_list([f for f in report.stack if not f.filename.startswith(machinery)])
    hint = f" ({error.hint})" if isinstance(error, TakoError) and error.hint else ""
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    what = said if isinstance(error, _TooSlow) else f"{type(error).__name__}: {said}{hint}"
    return Mistake(str(place), line, f"cannot be imported: {what}", "".join(report.format()).rstrip())


def spelled(flow: Declared) -> dict[str, Any]:
    """A declared workflow for programs: durations in seconds."""
    shown = msgspec.to_builtins(flow)
    for name in ("backoff_base", "backoff_max", "timeout"):
        if shown[name] is not None:
            shown[name] = shown[name] / clock.SECOND
    return dict(shown)
