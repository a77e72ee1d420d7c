"""A worker that hangs before it reads its secrets."""

import sys

sys.stdout.write("up\n")
sys.stdout.flush()
sys.stdin.read()
