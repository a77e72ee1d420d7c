"""A server, through the system's `ssh`: words in, `Done` out.

Everything is as the user has it: aliases, agent, jump hosts, ports, hardware keys and known hosts come from their own
configuration, and `TAKO_SSH` may name another program or another file (`ssh -F ci.config`). What is set here is what a
deploy needs beside that: one connection that all commands share, a dead link noticed within seconds, and no host key
taken on trust.

A command is a list of words. It is quoted once, in `_Ssh.words`, and nowhere else.
"""

import contextlib
import os
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tako_runtime.errors import InvalidValue, TakoError

#: What ssh ends with when it is the connection that failed. A command may end with it too.
CONNECTION = 255

#: How long a connection may take, how often an idle one is asked whether it lives, and how many answers may fail.
CONNECT, ASK, MISSES = 10, 2, 3

#: How long the shared connection stays after the last command, so that the next `tako` need not log in again.
STAYS = "60s"

_CHUNK = 1 << 17

#: ssh asks at the terminal, for several servers one after the other.
_asking = threading.Lock()

_NOT_ASKED = (
    "A key with a passphrase, a PIN or a touch is asked for at a terminal only, or by an agent that has it (ssh-add)."
)

#: No host that ssh could understand has one of these; a shell between might understand them too well.
_NO_HOST = re.compile(r"^-|@-|[\x00-\x20\x7f-\xa0'\"`$\\;&<>|(){}*?!]|^$")


class Done(NamedTuple):
    """How a command on a server ended, and what it said."""

    code: int
    out: str
    err: str


class Unreachable(TakoError):
    """The server cannot be reached."""

    code = "unreachable"


class LinkLost(Unreachable):
    """The connection to the server broke. What was under way there may have been done or not."""

    code = "link_lost"


class HostKeyRefused(Unreachable):
    """The server's host key is not the one that is known for it, or none is known."""

    code = "host_key"


class CommandFailed(TakoError):
    """A command on the server failed."""

    code = "command_failed"

    def __init__(self, server: str, words: Sequence[str], done: Done) -> None:
        self.done = done
        said = (done.err.strip() or done.out.strip()).splitlines()[-30:]
        super().__init__("\n".join([f"{server}: {_shown(words)} ended with {done.code}", *said]))


class Remote:
    """One server, by its name in tako.toml and by the host that ssh is told. `asking` says that a person is there, whom
    ssh may ask for a passphrase or for a touch on a key."""

    def __init__(self, name: str, host: str, *, asking: bool = False) -> None:
        if _NO_HOST.search(host):
            raise InvalidValue(
                f"servers.{name}.host: {host!r} is no host", hint="Write it as for ssh: web-1, deploy@web-1.example.com"
            )
        self.name, self.host, self._asking = name, host, asking
        self._ssh = _Ssh(host, asking)

    # --- commands ---

    def run(
        self,
        words: Sequence[str],
        *,
        input: bytes | Path = b"",  # noqa: A002 -- the word that subprocess has for it
        timeout: float | None = None,
        sent: Callable[[int], None] | None = None,
    ) -> Done:
        """Carry out one command there. Raises `Unreachable` where it is the connection that failed: `LinkLost` if it
        may have begun. `sent` is told how many bytes of the input are on their way."""
        with tempfile.TemporaryFile() as out, self._started(words, out) as (process, said):
            try:
                _feed(process, input, sent)
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise LinkLost(f"{self.name}: {_shown(words)} did not end within {timeout:g} s") from None
            err = said()
            self.examine(code, err)
            out.seek(0)
            return Done(code, out.read().decode(errors="replace"), err)

    def done(self, words: Sequence[str], *, input: bytes | Path = b"", timeout: float | None = None) -> str:  # noqa: A002
        """What a command printed that has to succeed. Raises `CommandFailed` where it does not."""
        done = self.run(words, input=input, timeout=timeout)
        if done.code != 0:
            raise CommandFailed(self.name, words, done)
        return done.out

    def lines(self, words: Sequence[str], *, input: bytes = b"") -> Iterator[str]:  # noqa: A002
        """What a command prints, line by line, as it does. Raises `CommandFailed` at its end where it failed. Whoever
        stops listening ends it."""
        with self._started(words, subprocess.PIPE) as (process, said):
            try:
                _feed(process, input, None)
                assert process.stdout is not None
                for line in process.stdout:
                    yield line.decode(errors="replace").rstrip("\n")
                code = process.wait()
            finally:
                process.kill()
                process.wait()
            err = said()
            self.examine(code, err)
            if code != 0:
                raise CommandFailed(self.name, words, Done(code, "", err))

    def upload(self, source: Path, target: str, sent: Callable[[int], None] | None = None) -> None:
        """Put a file there. It has its name only once all of it is there: a link that breaks looks, from there, as the
        end of the file."""
        script = 'cat > "$1.part" && test "$(wc -c < "$1.part")" -eq "$2" && mv -f "$1.part" "$1"'
        words = ["sh", "-c", script, "upload", target, str(source.stat().st_size)]
        done = self.run(words, input=source, sent=sent)
        if done.code != 0:
            raise CommandFailed(self.name, ["upload", target], done)

    def download(self, words: Sequence[str], target: IO[bytes]) -> None:
        """Write what a command prints into a file here, byte for byte."""
        with self._started(words, target) as (process, said):
            _feed(process, b"", None)
            code, err = process.wait(), said()
            self.examine(code, err)
            if code != 0:
                raise CommandFailed(self.name, words, Done(code, "", err))

    def held_open(self, words: Sequence[str]) -> "subprocess.Popen[bytes]":
        """A command that goes on beside others, with pipes for its input and output. It sees the end of its input once
        this process ends, however that ends."""
        return subprocess.Popen(
            self._ssh.words(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def interactive(self, words: Sequence[str] = ()) -> list[str]:
        """The words of an ssh with a terminal there, for `exec`."""
        return self._ssh.words(words, terminal=True)

    # --- the connection ---

    def connect(self) -> None:
        """Log in, unless the connection is there already. Raises `Unreachable`, saying why and what to do."""
        with _asking if self._asking else contextlib.nullcontext():
            code, said = self._ssh.connect()
        if code != 0:
            raise self._ssh.explained(self.name, said, begun=False)

    def close(self) -> None:
        """End the shared connection now; it would stay for a minute."""
        self._ssh.control("exit")

    @contextlib.contextmanager
    def _started(
        self, words: Sequence[str], out: "IO[bytes] | int"
    ) -> "Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]":
        """What it says on stderr goes through a file, not a pipe: the shared connection, when this command has begun
        it, holds on to that."""
        with tempfile.TemporaryFile() as err:
            process = subprocess.Popen(self._ssh.words(words), stdin=subprocess.PIPE, stdout=out, stderr=err)

            def said() -> str:
                err.seek(0)
                return err.read().decode(errors="replace")

            try:
                yield process, said
            finally:
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def examine(self, code: int, said: str) -> None:
        """Tell the connection's 255 from the command's own: after the latter, the connection is still there."""
        if code == CONNECTION and not self._ssh.control("check"):
            raise self._ssh.explained(self.name, said)
        if code < 0:
            raise LinkLost(f"{self.name}: ssh was ended by signal {-code}")


class _Ssh:
    """The one place that knows ssh's options, how words are quoted for it, and what its messages mean."""

    def __init__(self, host: str, asking: bool) -> None:
        self._host, self._asking = host, asking
        self._program = shlex.split(os.environ.get("TAKO_SSH", "")) or ["ssh"]

    def words(self, words: Sequence[str], *, terminal: bool = False, extra: Sequence[str] = ()) -> list[str]:
        """The command here that carries out `words` there. Between lies the login shell of the user, which gets them
        quoted."""
        options = {
            "ControlMaster": "auto",
            "ControlPath": f"{_runtime_folder()}/%C",
            "ControlPersist": STAYS,
            "ConnectTimeout": str(CONNECT),
            "ServerAliveInterval": str(ASK),
            "ServerAliveCountMax": str(MISSES),
            "StrictHostKeyChecking": "yes",
            "BatchMode": "no" if self._asking else "yes",
            "RemoteCommand": "none",
            "LogLevel": "INFO",
        }
        told = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        there = [shlex.join(words)] if words else []
        return [*self._program, *extra, *told, "-t" if terminal else "-T", "--", self._host, *there]

    def connect(self) -> tuple[int, str]:
        """Log in; the exit code and what ssh said. To a person who is there it speaks itself, but for its log."""
        with tempfile.NamedTemporaryFile(prefix="tako-ssh-") as log:
            done = subprocess.run(
                self.words(["true"], extra=["-E", log.name] if self._asking else []), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=None if self._asking else log, check=False,
            )  # fmt: skip
            log.seek(0)
            return done.returncode, log.read().decode(errors="replace")

    def control(self, order: str) -> bool:
        """Ask something of the shared connection; whether it is there and did it."""
        words = self.words([], extra=["-O", order])
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0

    def explained(self, server: str, said: str, *, begun: bool = True) -> Unreachable:
        """What a failed connection means, and what to do about it. `begun` says that a command may have."""
        lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("debug")]
        last = lines[-1] if lines else ""
        by_hand = f"Try it by hand: {shlex.join([*self._program, self._host])}"
        if "IDENTIFICATION HAS CHANGED" in said:
            known = re.search(r"Offending \S+ key in (\S+):(\d+)", said)
            where = f" The one that was known is in {known[1]}, line {known[2]}." if known else ""
            return HostKeyRefused(
                f"{server}: the host key of {self._host} has changed: it is {self._fingerprint(said)} now",
                hint=f"Somebody may be listening in. Ask whoever runs that server whether it has a new key; if so, "
                f"remove the old one (ssh-keygen -R) and log in once by hand to accept it.{where}",
            )
        if "Host key verification failed" in said or "host key is known" in said:
            return HostKeyRefused(
                f"{server}: no host key is known for {self._host}: it shows {self._fingerprint('')}",
                hint=f"Compare that with the server's own (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub), and log "
                f"in once by hand to accept it: {shlex.join([*self._program, self._host])}",
            )
        if "Permission denied" in said:
            unsigned = next((line for line in lines if "signing failed" in line), "")
            if unsigned or not self._asking:
                by_hand = f"{_NOT_ASKED} {by_hand}"
            return Unreachable(f"{server}: {self._host} lets nobody in: {unsigned or last}", hint=by_hand)
        if begun and (not lines or re.search(r"not responding|Broken pipe|reset by|closed by|Connection closed", said)):
            return LinkLost(  # those who share the connection end without a word when it does
                f"{server}: the connection to {self._host} broke{last and ': '}{last}",
                hint="What was under way there may have been done or not. Once the network is back, do it again.",
            )
        return Unreachable(f"{server}: {self._host} cannot be reached: {last}", hint=by_hand)

    def _fingerprint(self, said: str) -> str:
        """Of the key that the server shows: from what ssh said, else by asking again, for ssh to say more."""
        if found := re.search(r"fingerprint for the (\S+) key sent.*?(SHA256:[\w+/=]+)", said, re.DOTALL):
            return f"{found[1]} {found[2]}"
        options = ["-v", "-o", "ControlPath=none", "-o", "BatchMode=yes", "-o", "LogLevel=DEBUG1"]
        asked = subprocess.run(
            self.words(["true"], extra=options), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        # With a jump host, there are two; the last one is that of the server.
        shown = re.findall(r"Server host key: (\S+ SHA256:[\w+/=]+)", asked.stderr.decode(errors="replace"))
        return shown[-1] if shown else "a key that ssh does not tell of"


def _feed(process: "subprocess.Popen[bytes]", given: bytes | Path, sent: Callable[[int], None] | None) -> None:
    """Hand over the input, and its end. A command that does not want all of it says why by its exit code."""
    assert process.stdin is not None
    total = 0
    try:
        with contextlib.ExitStack() as files:
            if isinstance(given, Path):
                source = files.enter_context(given.open("rb"))
                chunks: Iterator[bytes] = iter(lambda: source.read(_CHUNK), b"")
            else:
                chunks = (given[at : at + _CHUNK] for at in range(0, len(given), _CHUNK))
            for chunk in chunks:
                process.stdin.write(chunk)
                total += len(chunk)
                if sent is not None:
                    sent(total)
        process.stdin.close()
    except BrokenPipeError:
        pass


def _shown(words: Sequence[str]) -> str:
    """A command for people: a script among its words is not repeated."""
    return shlex.join(word if len(word) <= 60 and "\n" not in word else "..." for word in words)


def _runtime_folder() -> str:
    """Where the sockets of shared connections are: this user's alone, and short, as the path of a socket has to be."""
    told = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = next((p for p in (told, f"/run/user/{os.getuid()}") if p and len(p) < 30 and os.access(p, os.W_OK)), None)
    folder = Path(parent, "tako-ssh") if parent else Path(f"/tmp/tako-ssh-{os.getuid()}")  # noqa: S108 -- checked below
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    seen = folder.lstat()
    if seen.st_uid != os.getuid() or seen.st_mode & 0o077:
        raise TakoError(
            f"{folder} is not this user's alone, so no connection can be shared there",
            hint="Remove it: tako makes it anew.",
        )
    return str(folder)
