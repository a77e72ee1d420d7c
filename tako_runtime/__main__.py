"""python -m tako_runtime serve | worker | manifest | run: what a server runs, and what that starts. JSON on stdout."""

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tako_runtime import clock, log, store
from tako_runtime.child import NOTHING_TO_RUN
from tako_runtime.errors import TakoError
from tako_runtime.manifest import IMPORT_LIMIT, discover, manifest
from tako_runtime.output import captured
from tako_runtime.script import run_script
from tako_runtime.secrets import guarded, masked_json, receive, stored
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry

#: A worker whose supervisor is gone has this many seconds to reach a step boundary; then it takes all it started along.
ORPHAN_GRACE = 4.0

LEVELS = {"debug": log.DEBUG, "info": log.INFO, "warning": log.WARNING}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tako_runtime", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="execute the runs of one group")
    worker.add_argument("--group", default="default")
    worker.add_argument("--dir", default="workflows", help="the folder of workflow modules, within the working folder")
    worker.add_argument("--concurrency", type=int, default=10, help="runs at once")
    worker.add_argument("--idle-timeout", help="leave after this long without work; without it, never")
    worker.add_argument("--lease", default="15s", help="how long the worker is believed alive after its last word")
    worker.add_argument("--log-level", choices=LEVELS, default="info")
    serve = commands.add_parser("serve", help="one app on this server: workers, cron, old runs")
    serve.add_argument("--server", help="the name under [servers] whose settings hold here")
    serve.add_argument("--env", default="production", help="whose variables the workers get")
    serve.add_argument("--log-level", choices=LEVELS, default="info")
    manifest = commands.add_parser("manifest", help="print what the workflows declare, as JSON")
    manifest.add_argument("--dir", default="workflows")
    script = commands.add_parser("run", help="a script, as python would, with secrets")
    script.add_argument("script")
    script.add_argument("words", nargs=argparse.REMAINDER, help="what follows is the script's own")
    for command in (worker, manifest):
        command.add_argument("--import-limit", default=f"{IMPORT_LIMIT}s", help="how long one file's import may take")
    args = parser.parse_args(argv)
    if args.command == "run":
        run_script(args.script, args.words)
    try:
        return {"worker": _worker, "serve": _serve, "manifest": _manifest}[args.command](args)
    except TakoError as error:
        sys.stderr.write(f"{error}\n{error.hint}\n".rstrip("\n") + "\n")
        return 1


def _manifest(args: argparse.Namespace) -> int:
    from tako_runtime import config

    out = os.dup(1)  # what a module prints at import must not end up in the JSON
    os.dup2(2, 1)
    with guarded(receive()):
        _nothing_on_stdin()
        file = Path.cwd() / "tako.toml"
        known = config.load(file) if file.is_file() else None
        limit = clock.duration(args.import_limit, "--import-limit") / clock.SECOND
        found = manifest(Path.cwd(), args.dir, known, limit)
        said = masked_json(msgspec.json.encode(found), "the manifest") + b"\n"
    with os.fdopen(out, "wb") as pipe:  # a big one does not fit into it at once
        pipe.write(said)
    for mistake in found.mistakes:
        sys.stderr.write(f"{mistake.file}:{mistake.line}: {mistake.message}\n")
    return 1 if found.mistakes else 0


def _serve(args: argparse.Namespace) -> int:
    from tako_runtime import config
    from tako_runtime.server import Server, alone, serve

    found = config.load(Path.cwd() / "tako.toml")
    home = store.locate()._replace(url=found.storage.url, env=args.env)
    out = log.JsonLines(1, LEVELS[args.log_level])
    with log.sink(out), alone(home.app_dir, "supervisor"):
        secrets = stored(home.app_dir)
        opened = store.open_store(home)
        environment = {**found.variables(args.env), **os.environ, "TAKO_ENV": args.env}

        async def run() -> None:
            await serve(
                Server(
                    opened, home, found, out.pass_on, server=args.server, log_level=args.log_level,
                    environment=environment, secrets=secrets,
                )
            )  # fmt: skip

        try:
            asyncio.run(run())
        finally:
            opened.close()
            out.flush()
    return 0


def _nothing_on_stdin() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing != 0:
        os.dup2(nothing, 0)
        os.close(nothing)


def _worker(args: argparse.Namespace) -> int:
    lines = log.JsonLines(os.dup(1), LEVELS[args.log_level])
    with guarded(receive()), log.sink(lines), captured():
        try:
            return _work(args)
        finally:
            lines.flush()


def _work(args: argparse.Namespace) -> int:
    settings = Settings(
        group=args.group,
        concurrency=args.concurrency,
        idle_timeout=clock.duration(args.idle_timeout, "--idle-timeout") if args.idle_timeout else None,
        lease=clock.duration(args.lease, "--lease", least=100_000),
        max_value=store.limits().max_value,
    )
    lifeline = _Lifeline(os.dup(0))
    _nothing_on_stdin()
    faulthandler.enable(file=2, all_threads=False)  # a crash of the interpreter says where it was
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=False)  # and so does this, when the supervisor asks
    mistakes = []
    for mistake in discover(Path.cwd(), args.dir, clock.duration(args.import_limit, "--import-limit") / clock.SECOND):
        mistakes.append(mistake)
        log.emit(
            "file.broken", file=mistake.file, line=mistake.line, error=mistake.message, traceback=mistake.traceback
        )
    if mistakes and not any(flow.group == settings.group for flow in registry.values()):
        return NOTHING_TO_RUN
    opened, app_dir = store.current(), store.locate().app_dir
    gc.collect()
    gc.freeze()  # what is imported stays: no collection has to walk over it again
    gc.set_threshold(20_000, 20, 20)  # a batch of a hundred runs makes some thousand values that live for a commit
    told_to_stop = False
    while not told_to_stop:
        worker = Worker(opened, app_dir, registry, settings)
        reason, told_to_stop = asyncio.run(_until_stopped(worker, lifeline))
        if reason != "lost lease":  # with a lost one, start over with a new identity
            break
    opened.close()
    return 0


async def _until_stopped(worker: Worker, lifeline: "_Lifeline") -> tuple[str, bool]:
    """Work until a signal or the end of the supervisor says stop: why it ended, and whether it was told to."""
    loop = asyncio.get_running_loop()
    told_to_stop = False

    def stop(reason: str) -> None:
        nonlocal told_to_stop
        told_to_stop = True
        worker.stop(reason)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, "drained")
    lifeline.tell(lambda: loop.call_soon_threadsafe(stop, "supervisor gone"))
    return await worker.run(), told_to_stop


class _Lifeline:
    """The supervisor holds the other end of this pipe: when it closes, the supervisor is gone. It is watched by a
    thread, from before the first import, since an import and an event loop may hang."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._told: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._gone = False
        if stat.S_IFMT(os.fstat(fd).st_mode) in (stat.S_IFIFO, stat.S_IFSOCK):
            threading.Thread(target=self._watch, name="tako-lifeline", daemon=True).start()

    def tell(self, told: Callable[[], object]) -> None:
        """Call `told` once the supervisor is gone, from a thread."""
        with self._lock:
            self._told = told
            if self._gone:
                told()

    def _watch(self) -> None:
        while os.read(self._fd, 4096):
            pass
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


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a step's thread that cannot be stopped must not hold up the end
