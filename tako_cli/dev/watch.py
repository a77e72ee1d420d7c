"""Which saved files are new code: tako.toml, what is in the folder of the workflows, and what that has imported.

Only the folders of those files are watched, none below them: what a store, a virtual environment or a build writes is
never seen. What has changed is read off the files themselves, so that an event that was missed or told twice does no
harm, and a burst of saves is one change.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from watchfiles import awatch

#: A burst is over when nothing has happened for so long; it is not waited for longer than that. In milliseconds.
QUIET, LONGEST_BURST = 20, 200

Fingerprint = dict[Path, tuple[int, int, int]]


class Watch:
    """`changed(files)` is called in the event loop, with what has been saved, made or removed."""

    def __init__(self, root: Path, config: Path, folder: Path, changed: Callable[[list[Path]], None]) -> None:
        self._root, self._config, self._folder, self._changed = root, config, folder, changed
        self._imported: frozenset[Path] = frozenset()
        self._broken: frozenset[Path] = frozenset()
        self._moved = asyncio.Event()
        self._seen = self._fingerprint()

    def know(self, imported: Iterable[Path], broken: Iterable[Path]) -> None:
        """What the code at work has imported, and which files cannot be."""
        before = self._folders()
        self._imported, self._broken = frozenset(imported), frozenset(broken)
        now = self._fingerprint()  # what is new here is as it is, not changed; what is no concern any more is not gone
        self._seen = now | {path: was for path, was in self._seen.items() if path in now or not path.exists()}
        if self._folders() != before:
            self._moved.set()

    async def run(self) -> None:
        while True:
            self._moved.clear()
            self._look()  # nobody has watched since the last round
            async for _ in awatch(
                *self._folders(), recursive=False, watch_filter=None, step=QUIET, debounce=LONGEST_BURST,
                stop_event=self._moved,
            ):  # fmt: skip
                self._look()
                if self._folders() != self._watching:
                    break

    def _look(self) -> None:
        self._watching = self._folders()
        now = self._fingerprint()
        changed = sorted(path for path in now.keys() | self._seen.keys() if now.get(path) != self._seen.get(path))
        self._seen = now
        if changed:
            self._changed(changed)

    def _fingerprint(self) -> Fingerprint:
        found: Fingerprint = {}
        for path in {self._config, *self._imported, *self._broken, *self._modules()}:
            try:
                seen = path.stat()
            except OSError:
                continue
            found[path] = seen.st_mtime_ns, seen.st_size, seen.st_ino
        return found

    def _modules(self) -> Iterator[Path]:
        for folder in self._folders_of_workflows():
            yield from folder.glob("*.py")
        if self._broken:  # what is missing may be made anywhere
            for folder in self._folders():
                yield from folder.glob("*.py")

    def _folders(self) -> frozenset[Path]:
        found = {self._root, *self._folders_of_workflows()}
        found |= {path.parent for path in (*self._imported, *self._broken) if path.parent.is_dir()}
        if self._broken:
            found |= {
                path.parent for path in self._root.glob("[!._]*/*.py") if not (path.parent / "pyvenv.cfg").exists()
            }
        return frozenset(found)

    def _folders_of_workflows(self) -> Iterator[Path]:
        for folder, below, _ in os.walk(self._folder):
            yield Path(folder)
            below[:] = [name for name in below if not name.startswith((".", "__"))]
