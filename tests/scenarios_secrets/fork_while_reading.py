"""A child is started while the envelope is still being read. Prints whether it has the pipe."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from tako_runtime.secrets import VARIABLE, receive, secrets

LOOK = Path(__file__).with_name("look.py")

reading, writing = os.pipe()
os.set_inheritable(reading, True)  # as a child that was handed it has it
os.environ[VARIABLE] = str(reading)
pipe = os.fstat(reading).st_ino
reader = threading.Thread(target=receive)
reader.start()
envelope = json.dumps({"secrets": {"BIG": "x" * (1 << 20)}}).encode()
with os.fdopen(writing, "wb", 0) as out:
    sent = out.write(envelope[: 1 << 19])  # more than a pipe holds: over when the other thread reads
    seen = json.loads(subprocess.check_output([sys.executable, LOOK], close_fds=False))
    while sent < len(envelope):
        sent += out.write(envelope[sent:])
reader.join()
json.dump({"inherited": pipe in seen["pipes"], "length": len(secrets["BIG"])}, sys.stdout)
