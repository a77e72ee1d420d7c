"""What one project needs: its file, its store, its workflows, its secrets, its port."""

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from tako_cli import context
from tako_cli.doctor import Finding, broken, disk, warning, well
from tako_runtime import clock, holders, store
from tako_runtime.bell import socket_folder
from tako_runtime.config import Config, load
from tako_runtime.disk import filesystem, nearest, unusable
from tako_runtime.errors import ConfigError, StoreError, TakoError
from tako_runtime.feed import supervising
from tako_runtime.manifest import read
from tako_runtime.store import Home

#: A socket's path may have so many bytes everywhere, and the longest name of one has about forty of them.
LONGEST_PATH, LONGEST_NAME = 103, 40

#: A store whose newest run is later than now by more than this was written under another time.
AHEAD = clock.MINUTE


def project(path: Path) -> Iterator[Finding]:
    """All of it. Where tako.toml is wrong, what hangs on it is left out."""
    config = None
    try:
        config = load(path)
        home = store.locate()
    except TakoError as error:
        where = "settings" if config else "tako.toml"
        yield broken(where, str(error), error.hint or f"Correct {path}: tako config example shows every key.")
        return
    yield well("tako.toml", str(path))
    yield environment(config.root)
    yield disk.network(home.app_dir, filesystem(home.app_dir))
    yield disk.space(home.app_dir)
    yield the_store(home, clock.SystemClock().now())
    yield from private(home)
    yield from sockets(home)
    values: Mapping[str, str] = {}
    try:
        values = context.secrets(config, home)
        yield secrets(config, home, values)
    except ConfigError as error:
        own = home.app_dir / "secrets.json"
        mend = f"chmod 600 {own}, and see that it is yours" if str(own) in str(error) else error.hint
        yield broken("secrets", str(error), mend)
    yield from workflows(config, values)
    if config.app is not None:
        yield port(config.app.port, home)


def environment(root: Path) -> Finding:
    """Workflows are imported by the Python that tako runs in."""
    own = root / ".venv"
    if own.is_dir() and Path(sys.prefix).resolve() != own.resolve():
        return warning(
            "environment", f"tako runs in {sys.prefix}, not in this project's .venv",
            f"Install tako in {own}, and call {own / 'bin' / 'tako'}.",
        )  # fmt: skip
    return well("environment", sys.prefix)


def the_store(home: Home, now: int) -> Finding:
    anew = "tako dev --fresh begins with an empty one and keeps this; a backup may have more."
    try:
        seen = store.examine(home)
    except StoreError as error:
        return broken("store", str(error), error.hint or anew)
    if seen is None:
        there = nearest(home.app_dir)
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            refused = unusable(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), home.app_dir / "runs.db")
            return broken("store", str(refused), refused.hint)
        return well("store", "none yet: the first tako dev, or the first run, makes it")
    if seen.damage:
        return broken("store", f"{seen.path} is damaged: {'; '.join(seen.damage)}", anew)
    if seen.serves > seen.newest:
        what = (
            f"{seen.path} is for a tako that knows version {seen.serves}; this one knows versions up to {seen.newest}"
        )
        return broken("store", what, f"Upgrade tako. {anew}")
    if seen.latest is not None and seen.latest > now + AHEAD:
        ahead = clock.spell(seen.latest - now)
        what = f"its newest run was made {ahead} from now: the clock was wrong, then or now"
        return warning("store", what, "See that the clock is right; runs due at such a time wait for it.")
    version = f"version {seen.version}" + (f", {seen.newest} at its next opening" * (seen.version < seen.newest))
    return well("store", f"sound, {version}, {seen.runs} run{'s' * (seen.runs != 1)}, {disk.size(seen.size)}")


def private(home: Home) -> Iterator[Finding]:
    """Payloads and results are for this user's eyes."""
    for path in (home.app_dir, home.app_dir / "runs.db"):
        if path.exists() and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            wanted = "700" if path.is_dir() else "600"
            yield warning("store", f"others may look into {path} (mode {mode:04o})", f"chmod {wanted} {path}")


def sockets(home: Home) -> Iterator[Finding]:
    """Those that wake workers. Without them, work waits for the next look, up to a second."""
    folders = [socket_folder(home.app_dir / name) for name in ("bell", "feed")]
    long = [one for one in folders if len(os.fsencode(one)) + 1 + LONGEST_NAME > LONGEST_PATH]
    left = [path for one in folders if one.is_dir() for path in sorted(one.iterdir()) if not _is_heard(path)]
    if long:
        yield broken(
            "sockets", f"the path {long[0]} is too long for one, so each start waits up to a second",
            f"Move the project to a shorter path, or see to it that /tmp/tako-{os.getuid()} is yours, with mode 0700.",
        )  # fmt: skip
    elif left:
        what = f"{len(left)} left by a process that is gone"
        yield warning("sockets", what, " ".join(["rm", *map(str, left[:3])]))
    else:
        yield well("sockets", str(folders[0]))


def _is_heard(path: Path) -> bool:
    """Whether a process listens there."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except OSError as error:
                if error.errno in (errno.EPROTOTYPE, errno.ECONNREFUSED):  # of the other kind, or nobody's
                    continue
            # A full queue is somebody's.
            return True
    return False


def secrets(config: Config, home: Home, values: Mapping[str, str]) -> Finding:
    required = config.secrets.required
    if missing := [name for name in required if name not in values]:
        what = f"not set: {', '.join(missing)}"
        return broken("secrets", what, f"tako secrets set {missing[0]}")
    return well("secrets", f"{len(values)} there, {len(required)} required")


def workflows(config: Config, values: Mapping[str, str]) -> Iterator[Finding]:
    """Imported in a process of their own."""
    home = store.project_home(config.name, config.root, config.storage.url)
    try:
        found = read(config.root, config.workflows.dir, context.environment(config, home), values)
    except ConfigError as error:
        yield broken("workflows", str(error), error.hint or "tako workflows ls says it too, once it is mended.")
        return
    for one in found.mistakes:
        place = context.place(one.file, one.line)
        yield broken("workflows", f"{place}: {one.message}", f"Correct {place}, then: tako workflows ls")
    if not found.mistakes:
        scheduled = sum(flow.schedule is not None for flow in found.workflows)
        yield well("workflows", f"{len(found.workflows)} declared, {scheduled} on a schedule")


def port(number: int, home: Home) -> Finding:
    """Free, or this project's own."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
            probe.listen()
            return well("port", f"{number} is free")
        except PermissionError:
            return broken("port", f"{number} is for root alone", "Set a port above 1023 in [app].")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return broken("port", f"{number}: {error.strerror}", "Set another port in [app].")
    others, ours = holders.of_port(number), supervising(home.app_dir)
    if ours is not None and any(ours.pid in holders.ancestors(one.pid) for one in others):
        return well("port", f"{number} is held by this project's own {ours.what}, process {ours.pid}")
    if not others:
        return broken(
            "port", f"{number} is taken, by another user's process", f"Set another port in [app] than {number}."
        )
    who = " and ".join(f"process {one.pid} ({one.command})" for one in others)
    pids = " ".join(str(one.pid) for one in others)
    return broken("port", f"{number} is taken by {who}", f"Stop it (kill {pids}), or set another port in [app].")
