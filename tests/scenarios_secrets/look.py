"""Prints what this process has inherited: its open pipes by inode, and its environment."""

import json
import os
import stat
import sys
from pathlib import Path

pipes = []
for entry in list(Path("/dev/fd").iterdir()):
    try:
        seen = os.fstat(int(entry.name))
    except OSError:  # the folder's own
        continue
    if stat.S_ISFIFO(seen.st_mode):
        pipes.append(seen.st_ino)
json.dump({"pipes": pipes, "environ": dict(os.environ)}, sys.stdout)
