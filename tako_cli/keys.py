"""Whose keys open a vault: this user's own, which read, and the public ones of a team, which it is encrypted to.

Own keys are an age identity at `$XDG_CONFIG_HOME/tako/identity`, made when there is no other, and the SSH keys
`~/.ssh/id_ed25519` and `~/.ssh/id_rsa`. age can use neither an SSH key with a passphrase nor one of another kind, such
as of a hardware token: who has only those gets an identity. No message has any part of a private key.
"""

import contextlib
import os
import re
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tako_runtime.errors import ConfigError, InvalidValue

_SSH = ("id_ed25519", "id_rsa")

_PUBLIC = "A public key is one line that begins with age1, ssh-ed25519 or ssh-rsa: ~/.ssh/id_ed25519.pub has one."


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Someone who can read: the key alone, and what it is called."""

    key: str
    name: str = ""

    @property
    def line(self) -> str:
        return f"{self.key} {self.name}".strip()

    @property
    def short(self) -> str:
        """As a person would recognise it."""
        return self.name or f"{self.key[:20]}..."

    def recipient(self) -> Any:
        """As age takes it."""
        import pyrage

        kind = pyrage.x25519 if self.key.startswith("age1") else pyrage.ssh
        try:
            return kind.Recipient.from_str(self.key)
        except pyrage.RecipientError:
            what = f"{self.key[:60]!r} is no public key that secrets can be encrypted to"
            raise InvalidValue(what, hint=_PUBLIC) from None


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A private key of this user's, and its public one."""

    identity: Any
    public: PublicKey


def public_key(text: str) -> PublicKey:
    """A key as somebody gives it: itself, or the path of a file that has it. Raises `InvalidValue`."""
    words = text.split()
    if _is_private(text):
        raise InvalidValue(
            "that is a private key: nobody else may have it", hint=f"Make a new one, for it was shown. {_PUBLIC}"
        )
    if len(words) == 1 and not words[0].startswith("age1"):
        path = Path(words[0]).expanduser()
        try:
            inside = path.read_text("utf-8") if path.is_file() else ""
        except (OSError, ValueError):
            inside = ""
        if _is_private(inside):
            raise InvalidValue(f"{path} is a private key: nobody else may have it", hint=_PUBLIC)
        words = inside.split() or words
    kind = words[0] if words else ""
    size = 2 if kind.startswith("ssh-") else 1
    found = PublicKey(" ".join(words[:size]), " ".join(words[size:]))
    found.recipient()
    return found


def own_keys() -> tuple[list[OwnKey], list[str]]:
    """Those that can be used, the identity first; and why each other one cannot."""
    import pyrage

    found: list[OwnKey] = []
    unusable: list[str] = []
    if (identity := identity_file()).exists():
        found.append(_read_identity(identity))
    for path in (Path.home() / ".ssh" / name for name in _SSH):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        try:
            identity_ = pyrage.ssh.Identity.from_buffer(data)
        except pyrage.IdentityError as error:
            why = "has a passphrase" if "decrypted" in str(error) else "is of a kind that age cannot use"
            unusable.append(f"{path} {why}")
            continue
        if (public := _public_of(path)) is not None:
            found.append(OwnKey(identity_, public))
    return found, unusable


def first_key() -> OwnKey:
    """This user's key for what is encrypted from now on; an identity is made where there is none that can be used."""
    found, _ = own_keys()
    return found[0] if found else make_identity()


def identity_file() -> Path:
    """Where the identity is. An XDG folder that is not absolute does not count, as its specification has it."""
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".config") / "tako" / "identity"


def make_identity() -> OwnKey:
    """Make this user's identity, or read that of another process which was faster."""
    import pyrage

    path = identity_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = pyrage.x25519.Identity.generate()
    fresh = path.with_name(f".identity.{os.getpid()}")
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write("# Opens the secrets that are shared with it. Keep it, and show it to nobody.\n")
            out.write(f"# {made.to_public()}\n{made}\n")
            out.flush()
            os.fsync(file)
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return _read_identity(path)


def _read_identity(path: Path) -> OwnKey:
    import pyrage

    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:04o}: others may read it", hint=f"chmod 600 {path}")
    lines = [line.strip() for line in path.read_text("utf-8", "replace").splitlines()]
    try:
        [secret] = [line for line in lines if line and not line.startswith("#")]
        identity = pyrage.x25519.Identity.from_str(secret)
    except (ValueError, pyrage.IdentityError):
        raise ConfigError(
            f"{path} is no age identity", hint="Restore it from a copy, or move it away: then another one is made."
        ) from None
    return OwnKey(identity, PublicKey(str(identity.to_public()), _who()))


def _public_of(private: Path) -> PublicKey | None:
    """The public half of an SSH key: from the file beside it, or from ssh-keygen."""
    try:
        text = private.with_name(f"{private.name}.pub").read_text("utf-8")
    except (OSError, ValueError):
        try:
            words = ["ssh-keygen", "-y", "-P", "", "-f", str(private)]
            text = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        except OSError:
            return None
    try:
        found = public_key(text)
    except InvalidValue:
        return None
    return PublicKey(found.key, found.name or _who())


def _who() -> str:
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user that has no name here
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _is_private(text: str) -> bool:
    return re.search(r"AGE-SECRET-KEY-|PRIVATE KEY-----", text, re.IGNORECASE) is not None
