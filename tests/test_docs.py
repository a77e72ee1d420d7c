"""What the documentation inside the code says is there, and its examples hold."""

import doctest
import importlib
import inspect
import pkgutil
import re
import types
from typing import Any

import pytest

import tako_runtime
from tako_runtime import errors

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tako_runtime.__path__, "tako_runtime.")
    if "__main__" not in module.name
)


def loaded(name: str) -> types.ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_hold(name: str) -> None:
    assert doctest.testmod(loaded(name)).failed == 0


def test_there_are_examples_at_all() -> None:
    assert sum(doctest.testmod(loaded(name)).attempted for name in MODULES) >= 10


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert len((loaded(name).__doc__ or "").strip()) > 20


def public() -> list[Any]:
    """The public names, and the public methods of the classes among them."""
    found = []
    for name in tako_runtime.__all__:
        offered = getattr(tako_runtime, name)
        found.append(pytest.param(offered, id=name))
        if inspect.isclass(offered):
            found += [
                pytest.param(member, id=f"{name}.{key}")
                for key, member in vars(offered).items()
                if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
            ]
    return found


#: Whose name says it all, or whose other face says it.
SAYS_IT = {"run_id", "workflow"}


@pytest.mark.parametrize("offered", public())
def test_every_public_name_is_documented(offered: Any) -> None:
    named = offered.fget if isinstance(offered, property) else offered
    if offered is tako_runtime.secrets:
        named = offered = type(offered)
    if named.__name__ in SAYS_IT and isinstance(offered, property):
        return
    face = named.__qualname__.replace("SyncStep.", "Step.")
    if face != named.__qualname__:  # the blocking face of a step is documented where the step is
        offered = getattr(tako_runtime.Step, named.__name__)
    assert inspect.getdoc(offered), named.__qualname__


def all_errors() -> list[type[errors.TakoError]]:
    return [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.TakoError)]


def tree() -> dict[str, str]:
    """Each error that the docstring of `errors.py` draws, and the one that it hangs under."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for marks, name in re.findall(r"^([ │├└─]+)(\w+)", errors.__doc__ or "", re.MULTILINE):
        while above and above[-1][0] >= len(marks):
            above.pop()
        parents[name] = above[-1][1] if above else "Exception"
        above.append((len(marks), name))
    return parents


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = {name: parent for name, parent in tree().items() if hasattr(errors, name)}
    assert drawn == {error.__name__: error.__bases__[0].__name__ for error in all_errors()}


@pytest.mark.parametrize("error", all_errors(), ids=lambda each: each.__name__)
def test_an_errors_docstring_is_its_message(error: type[errors.TakoError]) -> None:
    assert str(error()) == (error.__doc__ or "").strip()
    assert str(error()).endswith(".")
    assert str(error("said")) == "said"
    assert error("said", hint="do").hint == "do"
    assert re.fullmatch(r"[a-z_]+", error.code)


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [error.code for error in all_errors()]
    assert len(set(codes)) == len(codes)


def test_every_error_of_the_tree_is_offered() -> None:
    missing = {error.__name__ for error in all_errors()} - set(tako_runtime.__all__)
    assert missing == set()
