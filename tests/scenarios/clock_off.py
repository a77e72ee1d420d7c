"""All that `python -m tako_runtime` is, on a machine whose clock is off by so many seconds as TEST_CLOCK_OFF says."""

import os
import time

right, off = time.time_ns, int(os.environ["TEST_CLOCK_OFF"]) * 1_000_000_000  # noqa: TID251
time.time_ns = lambda: right() + off  # noqa: TID251

from tako_runtime.__main__ import main  # noqa: E402 -- with that clock

raise SystemExit(main())
