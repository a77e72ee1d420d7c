"""Wheels that are made here: of `tako_runtime`, from what is installed, and of pip, which a server may not have.

The runtime's wheel is called `tako`, so that a project that depends on tako is satisfied by it, and has neither the
command nor what only the command needs. It is made from the package as this process would import it: a checkout, an
editable install or an installed wheel. The same files give the same bytes.
"""

import base64
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

from tako_runtime.errors import TakoError

#: What only the command needs. What is not named here goes to the server: one too many is no harm, one too few is.
OF_THE_COMMAND = frozenset(
    {"typer", "rich", "watchfiles", "tomli-w", "tomlkit", "cookiecutter", "pathspec", "pyrage"}
)  # fmt: skip

#: The time of every file in a wheel: the first that a zip can have.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel's file name, its content, and what it needs."""

    name: str
    data: bytes
    needs: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@cache
def runtime() -> Wheel:
    """The wheel of `tako_runtime`."""
    from tako_runtime import __version__

    found = util.find_spec("tako_runtime")
    assert found is not None
    assert found.submodule_search_locations is not None
    [folder] = map(Path, found.submodule_search_locations)
    files = {f"tako_runtime/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in _sources(folder)}
    stated = metadata.metadata("tako")
    lines = ["Metadata-Version: 2.1", "Name: tako", f"Version: {__version__}"]
    lines += [f"Requires-Python: {stated['Requires-Python']}", *_needs(stated)]
    data = _zipped(files, f"tako-{__version__}.dist-info", lines)
    return Wheel(f"tako-{__version__}-py3-none-any.whl", data, tuple(_needs(stated)))


@cache
def pip() -> Wheel:
    """pip as a wheel, which `python pip-*.whl/pip` runs: the one that is installed here, or the one that came with this
    Python, or the one that uv gets."""
    try:
        return _repacked(metadata.distribution("pip"))
    except metadata.PackageNotFoundError:
        pass
    bundled = util.find_spec("ensurepip")
    if bundled is not None and bundled.origin is not None:
        for path in sorted(Path(bundled.origin).parent.glob("_bundled/pip-*.whl")):
            return Wheel(path.name, path.read_bytes())
    if (uv := find_uv()) is None:
        raise TakoError(
            "there is neither pip nor uv here, so no dependency can be locked",
            hint=f"Give this Python a pip ({sys.executable} -m ensurepip), or install uv.",
        )
    with tempfile.TemporaryDirectory(prefix="tako-pip-") as folder:
        words = [uv, "pip", "install", "--quiet", "--target", folder, "pip"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TakoError(f"uv cannot get pip: {done.stderr.strip()}")
        [found] = metadata.distributions(name="pip", path=[folder])
        return _repacked(found)


def find_uv() -> str | None:
    """uv on PATH, or beside the Python that tako runs in."""
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if beside.is_file() else None)


def _sources(folder: Path) -> Iterable[Path]:
    return (
        path for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".pyo")
    )  # fmt: skip


def _needs(stated: "metadata.PackageMetadata") -> list[str]:
    """What the runtime needs, and its extras, as tako's own metadata has it."""
    needs = [need for need in stated.get_all("Requires-Dist") or () if project_name(need) not in OF_THE_COMMAND]
    extras = [f"Provides-Extra: {extra}" for extra in stated.get_all("Provides-Extra") or ()]
    return [*extras, *(f"Requires-Dist: {need}" for need in needs)]


def project_name(requirement: str) -> str:
    """The normal form of a requirement's name; empty where it has none.

    >>> project_name("Typing_Extensions[all]>=4; python_version < '3.12'")
    'typing-extensions'
    """
    named = re.match(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)", requirement)
    return re.sub(r"[-_.]+", "-", named[1]).lower() if named else ""


def _repacked(found: metadata.Distribution) -> Wheel:
    """A pure wheel again, from what was installed of one."""
    files: dict[str, bytes] = {}
    info = f"{found.name}-{found.version}.dist-info"
    for path in found.files or ():
        inside = path.as_posix()
        if inside.startswith("..") or "__pycache__" in path.parts or not Path(str(found.locate_file(path))).is_file():
            continue
        if inside.startswith(f"{info}/") and path.name not in ("entry_points.txt", "LICENSE", "LICENSE.txt"):
            continue
        files[inside] = Path(str(found.locate_file(path))).read_bytes()
    lines = ["Metadata-Version: 2.1", f"Name: {found.name}", f"Version: {found.version}"]
    lines += [f"Requires-Python: {needed}" for needed in found.metadata.get_all("Requires-Python") or ()]
    return Wheel(f"{found.name}-{found.version}-py3-none-any.whl", _zipped(files, info, lines))


def _zipped(files: Mapping[str, bytes], info: str, about: Iterable[str]) -> bytes:
    """A pure wheel's bytes: names in order, one time, nothing of this machine."""
    whole = dict(sorted(files.items()))
    whole[f"{info}/METADATA"] = ("\n".join(about) + "\n").encode()
    whole[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tako\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in whole.items()]
    whole[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in whole.items():
            one = zipfile.ZipInfo(name, _EPOCH)
            one.compress_type, one.external_attr, one.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            archive.writestr(one, data)
    return out.getvalue()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
