"""python -m benchmarks.peers FILE: a worker of an engine that has no command for one."""

import sys
from importlib import import_module

import_module(f"benchmarks.peers.{sys.argv[1]}").work()
