"""Secrets at rest: `.tako/secrets/ENV.age`, encrypted to the public keys in `.tako/secrets/ENV.keys`. Both are safe to
commit, and worth it: whoever has one of the private keys can deploy.

`development` has a vault like any other environment. What a command of tako's own runs here gets its values, and over
them those of `secrets.json` beside the store, which are this user's alone. They are opened in the command; the runtime
knows of no vault.

The keys are also named inside, where nobody can add to them unseen: a line that somebody has written into ENV.keys is
not encrypted to until `tako secrets share` says so. A line that is taken out counts from the next change on.

Every change is made on a file of its own, synced and renamed, one process at a time: what cannot be finished has not
begun.
"""

import fcntl
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from tako_cli import keys
from tako_cli.keys import OwnKey, PublicKey
from tako_runtime.errors import ConfigError, InvalidValue, NotFound, Refused

#: How long one value may be, in bytes: all of them go through a pipe.
LONGEST = 1 << 17

_HEAD = """\
# Whose keys open the secrets of {env}. To add one: tako secrets share KEY --env {env}
# A line that is removed counts from the next change on; what it could read until then, it has read.
"""


class _Inside(msgspec.Struct, forbid_unknown_fields=True):
    secrets: dict[Annotated[str, msgspec.Meta(pattern=r"\A[A-Z][A-Z0-9_]*\Z")], str]
    readers: list[str]  # keys without their names


@dataclass(frozen=True, slots=True)
class Vault:
    """The secrets of one environment of the project in `root`."""

    root: Path
    env: str

    @property
    def folder(self) -> Path:
        return self.root / ".tako" / "secrets"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.env}.age"

    @property
    def key_file(self) -> Path:
        return self.folder / f"{self.env}.keys"

    def reveal(self) -> dict[str, str]:
        """All values, by name; none where there is no vault. Raises `ConfigError` where it cannot be opened."""
        return dict(self._open().secrets) if self.file.exists() else {}

    def readers(self) -> list[PublicKey]:
        """Whose keys are in the list beside it."""
        try:
            lines = self.key_file.read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.key_file} cannot be read: {error}") from None
        found: dict[str, PublicKey] = {}
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                if len(line.split()) == 1 and not line.startswith("age1"):
                    raise ConfigError(f"{self.key_file}:{number}: no public key", hint="Remove the line.")
                try:
                    one = keys.public_key(line)
                except InvalidValue as error:
                    raise ConfigError(f"{self.key_file}:{number}: {error}", hint="Remove the line.") from None
                found[one.key] = one
        return list(found.values())

    def keep(self, name: str, value: str) -> bool:
        """Keep a value; whether there was one before."""
        check_name(name)
        _check_value(value)
        before: list[bool] = []

        def change(values: dict[str, str]) -> None:
            before.append(name in values)
            values[name] = value

        self._change(change)
        return before[0]

    def remove(self, name: str) -> None:
        """Forget a value; `NotFound` where there is none."""

        def change(values: dict[str, str]) -> None:
            if values.pop(name, None) is None:
                known = ", ".join(sorted(values)) or "nothing"
                raise NotFound(f"there is no secret {name!r} in {self.env}", hint=f"There is: {known}.")

        self._change(change, make=False)

    def share(self, key: PublicKey) -> bool:
        """Let one more key read all of it; whether it could not before."""
        return key.key not in self._change(lambda values: None, key, make=False)

    # --- how it is kept ---

    def _change(
        self, change: Callable[[dict[str, str]], None], joining: PublicKey | None = None, *, make: bool = True
    ) -> set[str]:
        """Write what `change` makes of the values, for one more key if it is given; the keys that could read before."""
        with self._alone():
            if self.file.exists():
                inside, readers = self._open(), self.readers()
            elif make:
                own = keys.first_key().public
                inside, readers = _Inside({}, [own.key]), self.readers() or [own]
            else:
                raise NotFound(
                    f"there are no secrets of {self.env} yet", hint=f"Set one: tako secrets set NAME --env {self.env}"
                )
            before = set(inside.readers)
            if joining is not None and joining.key not in {one.key for one in readers}:
                readers.append(joining)
            self._check(readers, before | ({joining.key} if joining else set()))
            change(inside.secrets)
            plain = msgspec.json.encode(_Inside(dict(sorted(inside.secrets.items())), [one.key for one in readers]))
            sealed = self._sealed(plain, readers)
            # In this order: a key that is only in the list can be shared with again, one only inside would be dropped.
            _replace(self.key_file, (_HEAD.format(env=self.env) + "".join(f"{one.line}\n" for one in readers)).encode())
            _replace(self.file, sealed)
            return before

    def _check(self, readers: list[PublicKey], shared: set[str]) -> None:
        if not readers:
            raise ConfigError(f"{self.key_file} names no key, so nobody could read it", hint="Restore it from git.")
        if unknown := [one for one in readers if one.key not in shared]:
            raise Refused(
                f"{self.key_file} has a key that nobody has shared with: {', '.join(one.short for one in unknown)}",
                hint=f"If that is meant: tako secrets share '{unknown[0].line}' --env {self.env}\n"
                "If not, remove the line.",
            )

    def _sealed(self, plain: bytes, readers: list[PublicKey]) -> bytes:
        """Encrypted to the readers, of whom this user must be one: else the values could be lost in this very write."""
        import pyrage

        sealed = bytes(pyrage.encrypt(plain, [one.recipient() for one in readers], armored=True))
        try:
            pyrage.decrypt(sealed, [own.identity for own in keys.own_keys()[0]])
        except pyrage.DecryptError:
            raise Refused(
                f"none of your keys would open {self.file} any more: nothing was changed",
                hint=f"See that {self.key_file.name} has your public key, and a .pub is that of the SSH key beside it.",
            ) from None
        return sealed

    def _open(self) -> _Inside:
        import pyrage

        sealed = self.file.read_bytes()
        own, unusable = keys.own_keys()
        try:
            plain = pyrage.decrypt(sealed, [one.identity for one in own])
        except pyrage.DecryptError as error:
            raise self._unopened(sealed, str(error), own, unusable) from None
        try:
            return msgspec.json.decode(plain, type=_Inside)
        except (msgspec.MsgspecError, ValueError):  # kept out of the next error: it may show a part
            raise ConfigError(f"{self.file} holds no secrets of tako's", hint="Restore it from git.") from None

    def _unopened(self, sealed: bytes, said: str, own: list[OwnKey], unusable: list[str]) -> ConfigError:
        if b"<<<<<<<" in sealed:
            return ConfigError(
                f"{self.file} has the marks of a merge",
                hint="Take one side (git checkout --ours FILE, or --theirs), and set what the other one had again.",
            )
        if "No matching keys" not in said:
            return ConfigError(f"{self.file} is damaged: {said}", hint="Restore it from git.")
        mine = own[0] if own else keys.make_identity()
        names = f"tried: {', '.join(one.public.short for one in own)}" if own else "there was none to try"
        others = f"; {'; '.join(unusable)}" if unusable else ""
        return ConfigError(
            f"none of your keys opens the secrets of {self.env} ({names}{others})",
            hint=f"Ask somebody who can to run this, and to commit what it changes:\n"
            f"  tako secrets share --env {self.env} KEY\nwith this for KEY:\n  {mine.public.line}",
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time."""
        (self.root / ".tako").mkdir(mode=0o700, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def reveal(root: Path, env: str) -> dict[str, str]:
    """The secrets of an environment, by name; none where none were ever set."""
    return Vault(root, env).reveal()


def check_name(name: str) -> None:
    """`InvalidValue`, which shows nothing that may be a value, for what is no name of a secret."""
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        hint = "It is in UPPER_SNAKE, like STRIPE_KEY. Its value is asked for, and never stands on a command line."
        raise InvalidValue(f"{name.partition('=')[0]!r} is no name of a secret", hint=hint)


def kept_out_of_git(vault: Vault) -> list[Path]:
    """Those of a vault's files that git ignores, though they are meant to be committed."""
    return [file for file in (vault.file, vault.key_file) if file.exists() and _ignored(file)]


def _ignored(file: Path) -> bool:
    words = ["git", "-C", str(file.parent), "check-ignore", "-q", "--", file.name]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:  # no git here
        return False


def _check_value(value: str) -> None:
    size = len(value.encode("utf-8", "surrogatepass"))
    if not value:
        raise InvalidValue("the value is empty", hint="To have none: tako secrets rm NAME")
    if size > LONGEST or any("\ud800" <= character <= "\udfff" for character in value) or "\0" in value:
        what = f"it has {size:,} bytes, and {LONGEST:,} are the most" if size > LONGEST else "it is not text in UTF-8"
        hint = "Encode binary data in base64, and keep big files elsewhere."
        raise InvalidValue(f"the value cannot be kept: {what}", hint=hint)


def _replace(path: Path, data: bytes) -> None:
    """The file's new content, or its old one; never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(file)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
