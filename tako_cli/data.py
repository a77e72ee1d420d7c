"""The folders that come with tako and are not code: in a checkout at its top, installed inside the package."""

from pathlib import Path

_HERE = Path(__file__).parent


def folder(name: str) -> Path:
    """`templates` or `completions`."""
    inside = _HERE / "data" / name
    return inside if inside.is_dir() else _HERE.parent / name
