"""A new project from a cookiecutter template, without a trace in the user's home folder and without a network."""

import json
import shutil
import tempfile
from pathlib import Path

from tako_cli import data
from tako_runtime.errors import InvalidValue, NotFound, Refused, TakoError
from tako_runtime.store import APP_NAME

DEFAULT = "shop"


def scaffold(name: str, template: str, folder: Path, *, ask: bool) -> tuple[str, Path]:
    """Make the project in `folder / name`, or in `folder` itself for "."; its name and where it is. With `ask`, a
    template that has questions of its own asks them at the terminal. Raises with nothing made."""
    target = folder.resolve() if name == "." else folder / name
    app = target.name if name else ""
    if not APP_NAME.fullmatch(app):
        raise InvalidValue(
            f"{app!r} cannot be an app's name",
            hint="It begins with a letter a-z, goes on with a-z, 0-9 and '-', and has at most 63 characters.",
        )
    source = _template(template)
    _check_free(target)
    with tempfile.TemporaryDirectory(prefix="tako-init-") as made:
        project = _fill_in(source, app, Path(made), ask=ask)
        # What pip compiled of an installed template is none of the project's.
        compiled = shutil.ignore_patterns("__pycache__")
        shutil.copytree(project, target, symlinks=True, dirs_exist_ok=True, ignore=compiled)
    return app, target


def names() -> list[str]:
    """The templates that come with tako."""
    return sorted(path.parent.name for path in data.folder("templates").glob("*/cookiecutter.json"))


def _template(wanted: str) -> Path:
    """A template by name or by path: anything with a slash is a path, and so is "." or ".."."""
    path = Path(wanted).expanduser() if "/" in wanted or wanted in (".", "..") else data.folder("templates") / wanted
    if not (path / "cookiecutter.json").is_file():
        raise NotFound(
            f"no template {wanted!r}",
            hint=f"There is: {', '.join(names())}; or the path (with a '/') of a folder with a cookiecutter.json.",
        )
    return path.resolve()


def _check_free(target: Path) -> None:
    if target.is_dir():
        there = sorted(path.name for path in target.iterdir() if path.name != ".git")
        if there:
            listed = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            raise Refused(f"{target} is not empty: {listed}", hint="Choose another name, or empty the folder first.")
    elif target.exists() or target.is_symlink():
        raise Refused(f"{target} is there already, and is no folder", hint="Choose another name.")


def _fill_in(source: Path, app: str, scratch: Path, *, ask: bool) -> Path:
    from cookiecutter.exceptions import CookiecutterException
    from cookiecutter.main import cookiecutter

    questions = [key for key in json.loads((source / "cookiecutter.json").read_text()) if key[:1] != "_"]
    try:
        project = cookiecutter(
            str(source),
            no_input=not ask or questions == ["name"],
            extra_context={"name": app},
            output_dir=str(scratch / "project"),
            # Given as a dict, this leaves the user's own cookiecutter configuration and its folders alone.
            default_config={"replay_dir": str(scratch / "replay"), "cookiecutters_dir": str(scratch / "templates")},
        )
    except CookiecutterException as error:
        raise TakoError(f"the template {source} cannot be filled in: {error}") from error
    return Path(project)
