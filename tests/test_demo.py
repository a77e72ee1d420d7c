"""The demonstration of the main job holds."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_shows_a_run_that_survives_the_death_of_its_worker() -> None:
    demo = Path(__file__).with_name("demo.py")
    done = subprocess.run([sys.executable, demo], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing was lost." in done.stdout
    assert "worker died during attempt 1 in step charge" in done.stdout
