"""The screens of the documentation are what `tako dev` shows."""

import re
from pathlib import Path

import pytest
import screens

PAGE = (screens.DOCS / "development.md").read_text("utf-8")


def test_the_page_on_development_shows_both_and_they_are_there() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([\w-]+\.svg)\)", PAGE)
    assert shown == ["dev.svg", "dev-mend.svg"]
    assert all((screens.DOCS / name).is_file() for name in shown)


@pytest.mark.slow
def test_they_are_up_to_date_but_for_what_changes_with_time(tmp_path: Path) -> None:
    screens.main(tmp_path)
    for name in ("dev.svg", "dev-mend.svg"):
        now, kept = (screens.steady((folder / name).read_text("utf-8")) for folder in (tmp_path, screens.DOCS))
        assert now == kept, "make screens"
