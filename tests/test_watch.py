"""Which files are looked at, and what counts as a change of them."""

from pathlib import Path

from tako_cli.dev.watch import Watch


def test_what_was_looked_at_only_while_something_was_broken_is_not_gone_once_it_is_mended(tmp_path: Path) -> None:
    files = [tmp_path / "workflows" / "flows.py", tmp_path / "tests" / "test_flows.py", tmp_path / "tako.toml"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    changed: list[list[Path]] = []
    watch = Watch(tmp_path, files[2], files[0].parent, changed.append)
    watch.know([files[0]], [files[0]])
    watch._look()
    files[0].write_text("good = True\n")
    watch._look()
    assert changed == [[files[0]]]
    watch.know([files[0]], [])
    watch._look()
    assert changed == [[files[0]]]
    files[0].unlink()
    watch.know([files[0]], [])
    watch._look()
    assert changed[1:] == [[files[0]]], "a file that is removed is a change all the same"
