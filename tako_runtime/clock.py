"""The only module that reads time.

An instant is an `int`: microseconds since 1970-01-01 UTC. A duration is an `int` of microseconds too; people give it as
a `timedelta`, as seconds, or as text (`"90s"`, `"1h30m"`, `"3d"`), and `duration()` is the one place that reads it.
"""

import functools
import math
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from tako_runtime.errors import InvalidValue

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

#: The last instant that ISO 8601 with four-digit years can name: 9999-12-31.
LATEST = 253_402_300_799 * SECOND


def monotonic() -> int:
    """Microseconds since the machine's start, as service managers count them."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000


Duration = timedelta | int | float | str

_UNITS = {"us": 1, "ms": 1_000, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h|d|w)\s*")


class Clock(Protocol):
    """Where time comes from. Loops take one, so that a test can hand in its own."""

    def now(self) -> int:
        """Microseconds since 1970-01-01 UTC."""
        ...


def machine() -> int:
    """The machine's wall clock as it is."""
    return time.time_ns() // 1_000


class SystemClock:
    """The machine's wall clock, set right where it is far off what the machines of a shared store go by (`standard`).
    Leases and deadlines outlive processes and boots, so it is not a monotonic one."""

    def now(self) -> int:
        return time.time_ns() // 1_000 + standard.ahead


class MachineClock:
    """The machine's wall clock as it is: for all that concerns no other machine."""

    now = staticmethod(machine)


#: Clocks that differ by less count as agreeing: leases and due times bear that.
AGREE = SECOND


class Standard:
    """What several machines' clocks are held against: the one of the database that they share.

    `ahead` is by how much that is ahead of this machine's, as far as this process knows and goes by it: 0 while the two
    agree to within a second. So a machine whose clock is off by minutes neither takes its neighbours' runs from them,
    nor is taken for dead, nor wakes a sleeper early.

    >>> standard = Standard()
    >>> standard.heed(10 * MINUTE, asked=0, answered=2_000), standard.ahead == 10 * MINUTE - 1_000
    (True, True)
    """

    def __init__(self) -> None:
        self.ahead = 0

    def heed(self, shown: int, *, asked: int, answered: int) -> bool:
        """It has shown the time `shown` at some moment between two readings of `machine`. Whether what this process
        goes by is another time now."""
        ahead = shown - (asked + answered) // 2
        if abs(ahead - self.ahead) <= AGREE + (answered - asked) // 2:
            return False
        self.ahead = ahead if abs(ahead) > AGREE else 0
        return True


standard = Standard()


def duration(value: Duration, what: str = "duration", *, least: int | None = 0) -> int:
    """Microseconds of a `timedelta`, a number of seconds, or text such as `"500ms"`, `"1h30m"`, `"3d"`.

    Raises `InvalidValue` for NaN, infinity, other types, unreadable text, and for less than `least` microseconds.

    >>> duration("1h30m") == duration(5400) == duration(timedelta(minutes=90)) == 5_400_000_000
    True
    """
    if isinstance(value, timedelta):
        micros = value // timedelta(microseconds=1)
    elif isinstance(value, str):
        micros = _from_text(value, what)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidValue(f"{what} must be a timedelta, seconds, or text like '3d', not {value!r}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidValue(f"{what} must be a finite number of seconds, not {value!r}")
    elif abs(value) * SECOND > LATEST:
        raise InvalidValue(f"{what} reaches past the year 9999")
    else:
        micros = round(value * SECOND)
    if least is not None and micros < least:
        raise InvalidValue(f"{what} must be at least {spell(least)}, not {value!r}")
    if micros > LATEST:
        raise InvalidValue(f"{what} reaches past the year 9999")
    return micros


def _from_text(text: str, what: str) -> int:
    rest = text.strip().lower()
    sign = 1
    if rest.startswith("-"):
        sign, rest = -1, rest[1:]
    micros, at = 0.0, 0
    for part in _PART.finditer(rest):
        if part.start() != at:
            break
        micros += float(part[1]) * _UNITS[part[2]]
        at = part.end()
    if not rest or at != len(rest):
        raise InvalidValue(
            f"{what} {text!r} is not a duration",
            hint="Write a number and a unit: 500ms, 90s, 15m, 1h30m, 3d, 2w.",
        )
    return sign * round(min(micros, 2.0 * LATEST))


def instant(value: datetime, what: str = "time") -> int:
    """Microseconds since 1970 of a datetime with a time zone; `InvalidValue` for a naive one, which names no instant.

    >>> instant(datetime(1970, 1, 2, tzinfo=UTC)) == DAY
    True
    """
    if not isinstance(value, datetime):
        raise InvalidValue(f"{what} must be a datetime with a time zone, not {value!r}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise InvalidValue(
            f"{what} {value.isoformat()} has no time zone",
            hint="Say which one is meant: datetime(..., tzinfo=UTC), or datetime.now(UTC).",
        )
    return (value - _EPOCH) // timedelta(microseconds=1)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(micros: int) -> datetime:
    """The instant as a datetime in UTC."""
    return _EPOCH + timedelta(microseconds=micros)


def iso(micros: int) -> str:
    """ISO 8601 in UTC with microseconds.

    >>> iso(0)
    '1970-01-01T00:00:00.000000Z'
    """
    seconds, rest = divmod(micros, SECOND)
    return f"{_to_the_second(seconds)}.{rest:06}Z"


@functools.lru_cache(maxsize=64)
def _to_the_second(seconds: int) -> str:
    """Of each line of a busy log; most lines share it with the one before."""
    return moment(seconds * SECOND).replace(tzinfo=None).isoformat()


def spell(micros: int) -> str:
    """A duration as people write it, two units at most.

    >>> spell(90 * SECOND), spell(1_500), spell(0), spell(3 * DAY + 2 * HOUR + 5)
    ('1m30s', '1.5ms', '0s', '3d2h')
    """
    if micros < 0:
        return "-" + spell(-micros)
    if micros < 999_500:  # what is closer to the next unit is written in that
        return f"{micros / 1_000:.3g}ms" if micros else "0s"
    if micros < MINUTE - 50_000:
        return f"{micros / SECOND:.3g}s"
    rest = round(micros / SECOND)
    parts = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
        elif parts:
            break
    return "".join(parts[:2])


#: A day in a second: faster than that, schedules come faster than runs can be written.
FASTEST = 86_400


@dataclass(frozen=True, slots=True)
class Pace:
    """How much faster than the machine's clock durable time passes: 1, or what `tako dev --time-scale` says.

    It shortens what is stored: the end of a sleep, the deadline of a wait, the pause before a retry, the delay of an
    enqueue. So every stored instant is one of the machine's clock, and whoever reads it later, at whatever pace, is
    right. Leases, the `timeout` of code that runs, and health are about real work: they go by the machine's clock.

    >>> Pace(3600).real(HOUR) == SECOND
    True
    """

    scale: float = 1

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= FASTEST:  # no NaN is
            raise InvalidValue(
                f"a time scale is a number from 1 to {FASTEST}, not {self.scale:g}",
                hint="3600 lets an hour of sleeping pass in a second.",
            )

    def __str__(self) -> str:
        return str(int(self.scale)) if self.scale == int(self.scale) else repr(self.scale)

    def real(self, micros: int) -> int:
        """How long so much durable time takes. Nothing is shortened to nothing: a timeout of 0 means something else."""
        return micros if self.scale == 1 else max(round(micros / self.scale), min(micros, 1))

    def durable(self, micros: int) -> int:
        """How much durable time passes meanwhile."""
        return micros if self.scale == 1 else round(micros * self.scale)

    def told(self, micros: int) -> dict[str, Any]:
        """The facts of an event that names a time which came so much later: what that stands for, if it was scaled."""
        if self.scale == 1 or micros <= 0:
            return {}
        return {"time_scale": self.scale, "stands_for": spell(self.durable(micros))}

    def environment(self) -> dict[str, str]:
        """The variable from which a child finds the same pace."""
        return {"TAKO_TIME_SCALE": str(self)}


REAL_TIME = Pace()
