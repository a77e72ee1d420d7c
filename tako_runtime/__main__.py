"""python -m tako_runtime serve | worker | manifest | run: what a server runs, and what that starts. JSON on stdout."""

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tako_runtime import clock, log, store
from tako_runtime.child import NOTHING_TO_RUN
from tako_runtime.errors import StoreError, TakoError
from tako_runtime.guard import ORPHAN_GRACE
from tako_runtime.manifest import IMPORT_LIMIT, Manifest, declares, discover, imported
from tako_runtime.masking import guarded, masked_json
from tako_runtime.output import captured
from tako_runtime.secrets import receive, reserve, stored
from tako_runtime.spare import stand_by
from tako_runtime.store.base import DataVersion
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry

if TYPE_CHECKING:
    from tako_runtime.config import Config

LEVELS = {"debug": log.DEBUG, "info": log.INFO, "warning": log.WARNING}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tako_runtime", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="execute the runs of one group")
    worker.add_argument("--group", action="append", metavar="NAME[:N]", help="whose runs, and how many of them at once")
    worker.add_argument("--together", action="store_true", help="the runs of every group that a workflow names")
    worker.add_argument("--strict", action="store_true", help="end where a file cannot be imported")
    worker.add_argument("--broken", action="append", default=[], metavar="FILE", help="one that cannot be, as is known")
    worker.add_argument("--spare", action="store_true", help="wait on standard input for what to be")
    worker.add_argument("--dir", default="workflows", help="the folder of workflow modules, within the working folder")
    worker.add_argument("--concurrency", type=int, default=10, help="runs at once")
    worker.add_argument("--idle-timeout", help="leave after this long without work; without it, never")
    worker.add_argument("--lease", default="15s", help="how long the worker is believed alive after its last word")
    worker.add_argument("--log-level", choices=LEVELS, default="info")
    worker.add_argument("--local", action="store_true", help="those in this machine's own store beside a shared one")
    worker.add_argument("--trial", action="store_true", help="claim nothing: say that all is there, and stay")
    serve = commands.add_parser("serve", help="one app on this server: its own process, workers, cron")
    serve.add_argument("--server", help="the name under [servers] whose settings hold here")
    serve.add_argument("--env", default="production", help="whose variables they get")
    serve.add_argument("--on-trial", type=Path, metavar="FILE", help="prove it first where FILE names TAKO_RELEASE")
    serve.add_argument("--log-level", choices=LEVELS, default="info")
    manifest = commands.add_parser("manifest", help="print what the workflows declare, as JSON")
    manifest.add_argument("--dir", default="workflows")
    manifest.add_argument("--telling", action="store_true", help="first, a line for each file that is to be imported")
    manifest.add_argument("--without", action="append", default=[], metavar="FILE", help="leave it out")
    commands.add_parser("fit", help="which live runs would not fit the release in the working folder, as JSON")
    commands.add_parser("serves", help="which version a tako has to know to work with the shared store, as JSON")
    migrate = commands.add_parser("migrate", help="bring the store to this tako's version")
    migrate.add_argument("--breaking", action="store_true", help="also to what older ones cannot work with")
    commands.add_parser("switch", help="switch a server to a release, as the JSON on stdin says")
    backup = commands.add_parser("backup", help="print a copy of the store, made while others work with it")
    restore = commands.add_parser("restore", help="make what is on stdin the store; nobody may have that open")
    for command in (backup, restore):
        command.add_argument("--local", action="store_true", help="this machine's own, beside a shared one")
    operate = commands.add_parser("operate", help="answer what an operator asks, JSON lines from stdin to stdout")
    operate.add_argument("--server", help="the name under [servers] whose settings hold here")
    script = commands.add_parser("run", help="a script, as python would, with secrets")
    script.add_argument("script")
    script.add_argument("words", nargs=argparse.REMAINDER, help="what follows is the script's own")
    for command in (worker, manifest):
        command.add_argument("--import-limit", default=f"{IMPORT_LIMIT}s", help="how long one file's import may take")
    args = parser.parse_args(argv)
    args.parse = parser.parse_args
    if args.command == "run":
        from tako_runtime.script import run_script  # reads tako.toml, which a worker does without

        run_script(args.script, args.words)
    try:
        return COMMANDS[args.command](args)
    except TakoError as error:
        sys.stderr.write(f"{error}\n{error.hint}\n".rstrip("\n") + "\n")
        return 1


def _config() -> "Config | None":
    """The project's, where it has one: it knows the names of groups."""
    from tako_runtime import config

    file = Path.cwd() / "tako.toml"
    return config.load(file) if file.is_file() else None


def _manifest(args: argparse.Namespace) -> int:
    out = os.dup(1)  # what a module prints at import must not end up in the JSON
    os.dup2(2, 1)
    with guarded(receive()):
        _nothing_on_stdin()
        limit = clock.duration(args.import_limit, "--import-limit") / clock.SECOND
        config = _config()

        def tell(file: str) -> None:
            os.write(out, os.fsencode(file) + b"\n")

        told = {"told": tell} if args.telling else {}
        mistakes = list(discover(Path.cwd(), args.dir, limit, without=args.without, **told))
        found = declares(Path.cwd(), mistakes, config)
        said = masked_json(msgspec.json.encode(found), "the manifest") + b"\n"
    with os.fdopen(out, "wb") as pipe:  # a big one does not fit into it at once
        pipe.write(said)
    for mistake in found.mistakes:
        sys.stderr.write(f"{mistake.file}:{mistake.line}: {mistake.message}\n")
    return 1 if found.mistakes else 0


def _serve(args: argparse.Namespace) -> int:
    from tako_runtime import config, rollover
    from tako_runtime.alone import Lock
    from tako_runtime.port import passed_on
    from tako_runtime.server import Server, serve

    found = config.load(Path.cwd() / "tako.toml")
    found.check_environment(args.env, "production")
    listening = passed_on() if found.app is not None else None
    reserve()
    home = store.locate()._replace(url=found.storage.url, env=args.env)
    out = log.JsonLines(1, LEVELS[args.log_level])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until it can hand over, it is not asked to
    lock = Lock(home.app_dir, "supervisor")
    trial = rollover.trial(home.app_dir, args.on_trial)
    with log.sink(out), lock:
        if trial is None:
            lock.take()
        secrets = stored(home.app_dir)
        opened = store.open_store(home, patient=trial is None)  # who has to prove itself needs all that it will have
        environment = {**found.variables(args.env), **os.environ, "TAKO_ENV": args.env}

        async def run() -> None:
            server = Server(
                opened, home, found, out.pass_on, server=args.server, log_level=args.log_level,
                environment=environment, secrets=secrets, passed_on=listening,
            )  # fmt: skip
            await serve(server, lock, trial)

        try:
            asyncio.run(run())
        except rollover.NotTaken as error:
            sys.stderr.write(f"{error}\n" + "".join(f"{line}\n" for line in error.last_lines))
            return rollover.NOT_TAKEN
        finally:
            opened.close()
            out.flush()
    return 0


def _fit(_: argparse.Namespace) -> int:
    from tako_runtime.control import Control
    from tako_runtime.fit import unfit

    receive()  # the database may be another one than the app has yet
    declared = msgspec.json.decode(Path(".release/manifest.json").read_bytes(), type=Manifest)
    home = store.locate()
    opened, local = store.open_store(home), store.local_of(home)
    # Opening them may migrate them: what runs goes on with that (`store/version.py`).
    found = unfit(Control(opened, app_dir=home.app_dir, local=local), declared, Path.cwd())
    opened.close()
    if local is not None:
        local.close()
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _serves(_: argparse.Namespace) -> int:
    """With the secrets that it is handed, it answers for a database that the app does not have yet."""
    receive()
    try:
        told: dict[str, object] = {"serves": store.serves(store.locate())}
    except StoreError as error:
        told = {"error": str(error), "hint": error.hint}
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


def _migrate(args: argparse.Namespace) -> int:
    home = store.locate()
    store.migrate(home, breaking=args.breaking)
    sys.stdout.write(f"{store.where(home)}\n")
    return 0


def _switch(_: argparse.Namespace) -> int:
    """What it does, as a JSON object a line. Nobody need listen: it goes on all the same."""
    from tako_runtime.switch import NotSwitched, Spec, switch

    def say(**said: object) -> None:
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(said).encode() + b"\n")

    for number in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        spec = msgspec.json.decode(sys.stdin.buffer.read(), type=Spec, dec_hook=lambda kind, text: kind(text))
        say(taken=True, **switch(spec, lambda stage: say(stage=stage)))
    except NotSwitched as error:
        say(taken=False, error=str(error), last_lines=error.last_lines)
        return 1
    except OSError as error:
        say(taken=False, error=f"the switch could not be carried out: {error}", last_lines=[])
        return 1
    return 0


def _operate(args: argparse.Namespace) -> int:
    """For whoever is at the other end of the pipe, until it closes."""
    from tako_runtime.site import Site, answer

    def declared() -> Manifest:
        return msgspec.json.decode(Path(".release/manifest.json").read_bytes(), type=Manifest)

    def say(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    config, home = _config(), store.locate()
    opened = store.open_store(home)
    site = Site(opened, home, declared, config, args.server)
    try:
        answer(site, iter(sys.stdin.buffer.readline, b""), say)
    except BrokenPipeError:  # it has gone
        return 1
    finally:
        site.close()
        opened.close()
    return 0


def _home(args: argparse.Namespace) -> store.Home:
    return store.locate().embedded() if args.local else store.locate()


def _backup(args: argparse.Namespace) -> int:
    home = _home(args)
    copy = home.app_dir / f".backup.{os.getpid()}"
    try:
        store.backup(home, copy)
        with copy.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    finally:
        copy.unlink(missing_ok=True)
    sys.stdout.buffer.flush()
    return 0


def _restore(args: argparse.Namespace) -> int:
    found, aside = store.restore(_home(args), sys.stdin.buffer)
    told = {"path": str(found.path), "runs": found.runs, "aside": None if aside is None else str(aside.path)}
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


def _nothing_on_stdin() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing != 0:
        os.dup2(nothing, 0)
        os.close(nothing)


def _worker(args: argparse.Namespace) -> int:
    lines, own = log.JsonLines(os.dup(1), LEVELS[args.log_level]), set(sys.modules)
    with guarded(receive()), log.sink(lines), captured():
        try:
            if args.spare:
                store.current().do_sync(DataVersion())  # it is open by then
                try:
                    _, order = stand_by(_lines(0))
                except StopIteration:
                    return 0
                os.environ.clear()
                os.environ.update(order.environment)
                args = args.parse(order.words)
            return _work(args, own)
        finally:
            lines.flush()


def _lines(fd: int) -> Iterator[bytes]:
    held = b""
    while data := os.read(fd, 1 << 16):
        *lines, held = (held + data).split(b"\n")
        yield from lines


def _work(args: argparse.Namespace, own: set[str]) -> int:
    lifeline = _Lifeline(os.dup(0))
    _nothing_on_stdin()
    faulthandler.enable(file=2, all_threads=False)  # a crash of the interpreter says where it was
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=False)  # and so does this, when the supervisor asks
    _at_breakpoints(lifeline)
    root, limit = Path.cwd(), clock.duration(args.import_limit, "--import-limit") / clock.SECOND
    mistakes = []
    for mistake in discover(root, args.dir, limit, told=lambda file: log.emit("file.importing", file=file)):
        mistakes.append(mistake)
        log.emit(
            "file.broken", file=mistake.file, line=mistake.line, error=mistake.message, traceback=mistake.traceback
        )
    told = dict(name.partition(":")[::2] for name in args.group or ["default"])
    declared = {flow.group for flow in registry.values()}
    groups = declared or {"default"} if args.together else set(told)
    if mistakes and (
        not declared & groups or (args.strict and {mistake.file for mistake in mistakes} - {*args.broken})
    ):
        return NOTHING_TO_RUN
    if args.together:
        theirs = {name for _, name in imported(root)} | own | {"__main__"}
        modules = [name for name in sys.modules if name not in theirs]
        log.emit("worker.declared", manifest=msgspec.to_builtins(declares(root, mistakes, _config())), modules=modules)
    settings = [
        Settings(
            group=group,
            concurrency=int(told.get(group) or args.concurrency),
            idle_timeout=clock.duration(args.idle_timeout, "--idle-timeout") if args.idle_timeout else None,
            lease=clock.duration(args.lease, "--lease", least=100_000),
            max_value=store.limits().max_value,
            pace=store.pace(),
        )
        for group in sorted(groups)
    ]
    opened, app_dir = store.current(local=args.local), store.locate().app_dir
    if args.trial:
        return _stay(opened, lifeline, groups)
    gc.collect()
    gc.freeze()  # what is imported stays: no collection has to walk over it again
    gc.set_threshold(20_000, 20, 20)  # a batch of a hundred runs makes some thousand values that live for a commit
    told_to_stop = False
    while not told_to_stop:
        workers = [Worker(opened, app_dir, registry, each) for each in settings]
        reason, told_to_stop = asyncio.run(_until_stopped(workers, lifeline))
        if reason != "lost lease":  # with a lost one, start over with a new identity
            break
        if opened.shared and (going := sum(worker.going for worker in workers)):
            log.emit("worker.unstoppable", worker=workers[0].id, calls=going)
            return 1  # a thread ends with its process only
    opened.close()
    return 0


def _stay(opened: StoreThread, lifeline: "_Lifeline", groups: Collection[str]) -> int:
    """Be a worker that is ready and claims nothing, until SIGTERM or the supervisor's end."""
    opened.do_sync(DataVersion())
    flows = ", ".join(sorted(flow.name for flow in registry.values() if flow.group in groups))
    log.emit("worker.fit", group=", ".join(sorted(groups)), workflows=flows or "none")
    over = threading.Event()
    lifeline.tell(over.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    return 0


def _at_breakpoints(lifeline: "_Lifeline") -> None:
    """Go into our debugger, unless PYTHONBREAKPOINT says into which."""

    def hook(*_: object, **__: object) -> None:
        from tako_runtime import debugger  # costs 20 ms

        debugger.stand(sys._getframe(1), lifeline.cleared)  # noqa: SLF001 -- as the standard hook does

    if "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = hook


async def _until_stopped(workers: list[Worker], lifeline: "_Lifeline") -> tuple[str, bool]:
    """Work until a signal or the end of the supervisor says stop: why it ended, and whether it was told to. Where one
    of several workers ends, all do."""
    loop = asyncio.get_running_loop()
    told_to_stop = False

    def stop(reason: str) -> None:
        nonlocal told_to_stop
        told_to_stop = True
        for worker in workers:
            worker.stop(reason)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, "drained")
    lifeline.tell(lambda: loop.call_soon_threadsafe(stop, "supervisor gone"))
    running = [loop.create_task(worker.run()) for worker in workers]
    [first, *_], _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for worker in workers:
        worker.stop()
    await asyncio.wait(running)
    reasons = [task.result() for task in running]
    return first.result() if "lost lease" not in reasons else "lost lease", told_to_stop


class _Lifeline:
    """The supervisor holds the other end of this pipe: when it closes, the supervisor is gone. It is watched by a
    thread, from before the first import, since an import and an event loop may hang."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._told: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._said = threading.Semaphore(0)
        self._gone = False
        if stat.S_IFMT(os.fstat(fd).st_mode) in (stat.S_IFIFO, stat.S_IFSOCK):
            threading.Thread(target=self._watch, name="tako-lifeline", daemon=True).start()

    def tell(self, told: Callable[[], object]) -> None:
        """Call `told` once the supervisor is gone, from a thread."""
        with self._lock:
            self._told = told
            if self._gone:
                told()

    def cleared(self) -> None:
        """Wait until the supervisor has said that the terminal is cleared."""
        self._said.acquire()

    def _watch(self) -> None:
        while said := os.read(self._fd, 4096):
            self._said.release(said.count(b"\n"))
        with self._lock:
            self._gone = True
            if self._told is not None:
                with contextlib.suppress(RuntimeError):  # its loop is closed: it is about to end anyway
                    self._told()
        time.sleep(ORPHAN_GRACE)
        _end_now()


def _end_now() -> None:
    """With all that the steps have started, where a supervisor gave this process a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "worker": _worker, "serve": _serve, "manifest": _manifest, "fit": _fit, "serves": _serves,
    "migrate": _migrate, "switch": _switch, "operate": _operate, "backup": _backup, "restore": _restore,
}  # fmt: skip


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a step's thread that cannot be stopped must not hold up the end
