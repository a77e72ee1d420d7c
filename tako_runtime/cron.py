"""Cron: when a schedule fires. Pure: no store, no clock of its own; who asks says what time it is.

**The expression** is Debian's crontab(5): minute, hour, day of the month, month, weekday, each with `*`, values, names
(`mon`, `jan`), ranges, lists and steps. Where neither of the two day fields begins with `*`, one of them has to match;
else both have to. Beyond crontab(5): `L`, the last day of the month; `fri#2`, its second Friday; `friL`, its last one;
`5/15`, which is `5-59/15`; and an optional sixth field, seconds, **at the end**. `@hourly`, `@daily`, `@midnight`,
`@weekly`, `@monthly`, `@yearly` and `@annually` are what they are in crontab(5).

**Clock changes** go by Debian's cron(8), "Notes": a job at a fixed time that falls into the skipped hour runs right
after the change, one that falls into the repeated hour is not run again, and a job with wildcards follows the clock as
it is. So:

- A *fixed time* has neither `*` nor a step in its minute and its hour (`30 2 * * *`, `0 9-17 * * mon-fri`). It fires at
  the first instant at which the local clock shows that time or a later one, and never again for that time. In the gap
  of spring that is the first instant after it; several times lost in one gap fire there once, together. Of the two
  passes of autumn it is the first.
- Everything else is an *interval* (`*/15 * * * *`, `0 * * * *`, `0 8-20/2 * * *`). It fires whenever the local clock
  shows a time that matches, in both passes of autumn too. So every 15 minutes stays every 15 minutes of real time, and
  every hour every hour. Where the clock moves by something that is no multiple of the interval (`0 */2 * * *` and an
  hour, `0 * * * *` and Lord Howe's half), it stays with the local clock, and one step is off by the shift.

Two things of cron(8) are otherwise here. It goes by the first letter of a field (`0-59/15` would be fixed); here any
step makes an interval, so that `*/15`, `0/15` and `0-59/15` are the same schedule. And it takes a change of more than
three hours for a correction; here the rule holds for every change that the zone's own data has.

croniter does the search in the calendar, and nothing else: it sees plain lists of numbers and naive local time. Its own
reading of `5-5`, of `#` beside a day of the month, and of clock changes is not what is said above.
"""

import difflib
import re
import zoneinfo
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import chain, product
from typing import Literal, NamedTuple

import msgspec

from tako_runtime import clock
from tako_runtime.errors import InvalidValue
from tako_runtime.run import ScheduleRecord

#: A time that is late by less than this is late, not missed: the tick was slow, or another supervisor took over.
LATE = clock.MINUTE

#: A clock that was set back by more than this was wrong before: see `due`.
CORRECTION = 3 * clock.HOUR

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

_DAY = 86_400
_SECOND = timedelta(seconds=1)
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 -- naive local time is what the calendar is searched in
_CENTURY = 100 * 366 * _DAY  # the calendar's rarest date, a 29 February on one weekday, takes 40 years at most
_SOME_DAY = 1_767_225_600 * clock.SECOND  # 2026-01-01: whether a schedule fires at all does not depend on today
_NEVER = "No date has all that it asks for. Look at the day against the month, or at an hour that clock changes skip."


# ------------------------------------------------------------------------------------------------- when does it fire


@dataclass(frozen=True)
class Schedule:
    """A cron expression in a time zone. `Schedule.parse` makes one."""

    expression: str
    timezone: str
    fixed: bool = field(compare=False)  # a fixed time, not an interval
    lines: tuple[str, ...] = field(compare=False, repr=False)  # for croniter; what any of them matches, matches
    local: "LocalClock" = field(compare=False, repr=False)

    @classmethod
    def parse(cls, expression: str, timezone: str | None = None) -> "Schedule":
        """The schedule of a crontab expression in a time zone, UTC unless said.

        Raises `InvalidValue` for an expression that cannot be read or that never fires, and for an unknown zone.
        """
        timezone = "UTC" if timezone is None else timezone
        for value, what in ((expression, "a schedule"), (timezone, "a time zone")):
            if not isinstance(value, str):
                raise InvalidValue(f"{what} is text, not {value!r}")
        return _parse(" ".join(expression.split()), timezone)

    def next(self, after: int) -> int:
        """The first firing after that instant."""
        found = self._next(_seconds(after))
        if found is None:
            raise InvalidValue(f"schedule {self.expression!r} in {self.timezone} never fires", hint=_NEVER)
        return found * clock.SECOND

    def previous(self, at_or_before: int) -> int | None:
        """The last firing up to that instant, itself included; None where there was none in a century."""
        found = self._previous(_seconds(at_or_before))
        return None if found is None else found * clock.SECOND

    def _next(self, after: int) -> int | None:
        if self.fixed:
            wall = self.matching(self.local.furthest(after))
            return None if wall is None else self.local.first_showing(wall)
        give_up, offset = after + _CENTURY, self.local.offset(after)
        while after < give_up:
            wall = self.matching(_naive(after + offset))
            if wall is None:
                return None
            at = _stamp(wall) - offset
            change = self.local.change(after, at, offset)
            if change is None:
                return at
            after, offset = change - 1, self.local.offset(change)  # on with the clock as it is from the change on
        return None  # all that matches falls into gaps

    def _previous(self, at: int) -> int | None:
        if self.fixed:
            wall = self.matching(self.local.furthest(at) + _SECOND, back=True)
            return None if wall is None else self.local.first_showing(wall)
        give_up, offset = at - _CENTURY, self.local.offset(at)
        while at > give_up:
            wall = self.matching(_naive(at + offset) + _SECOND, back=True)
            if wall is None:
                return None
            found = _stamp(wall) - offset
            change = self.local.change_before(found, at, offset)
            if change is None:
                return found
            at, offset = change - 1, self.local.offset(change - 1)
        return None

    def matching(self, wall: datetime, *, back: bool = False) -> datetime | None:
        """The nearest naive local time that the expression names, strictly after `wall`, or strictly before it."""
        from croniter import CroniterBadDateError, croniter

        found: list[datetime] = []
        for line in self.lines:
            # A new one each time, for it keeps its place. Either day field or both: the lines have that in them.
            search = croniter(line, wall, ret_type=datetime, day_or=False)
            try:
                found.append(search.get_prev() if back else search.get_next())
            except CroniterBadDateError:
                continue
        return (max if back else min)(found, default=None)


@dataclass(frozen=True)
class LocalClock:
    """What the clocks of a zone show. Instants are whole seconds here, for firings and clock changes are."""

    zone: zoneinfo.ZoneInfo

    def offset(self, at: int) -> int:
        """Seconds by which the clock is ahead of UTC at that instant."""
        ahead = clock.moment(at * clock.SECOND).astimezone(self.zone).utcoffset()
        assert ahead is not None
        return ahead // _SECOND

    def change(self, after: int, until: int, offset: int) -> int | None:
        """The first instant in (after, until] at which the clock is not `offset` ahead, as it was until then."""
        for end in chain(range(after + _DAY, until, _DAY), (until,)):
            if self.offset(end) != offset:
                return after + 1 + bisect_left(range(after + 1, end), True, key=lambda at: self.offset(at) != offset)
        return None

    def change_before(self, after: int, until: int, offset: int) -> int | None:
        """The instant in (after, until] from which on the clock is `offset` ahead; None if it was all the time."""
        for start in chain(range(until - _DAY, after, -_DAY), (after,)):
            if self.offset(start) != offset:
                return start + 1 + bisect_left(range(start + 1, until), True, key=lambda at: self.offset(at) == offset)
        return None

    def furthest(self, at: int) -> datetime:
        """The latest time that the clock has shown so far: in the second pass of a fold, the end of the first."""
        local = clock.moment(at * clock.SECOND).astimezone(self.zone)
        if not local.fold:
            return local.replace(tzinfo=None)
        first = _stamp(local.replace(fold=0))
        ahead = self.offset(first)
        change = self.change(first, at, ahead)
        assert change is not None
        return _naive(change + ahead) - _SECOND

    def first_showing(self, wall: datetime) -> int:
        """The first instant at which the clock shows `wall` or a later time."""
        at = _stamp(wall.replace(tzinfo=self.zone))
        if _naive(at + self.offset(at)) == wall:
            return at
        before = _stamp(wall.replace(tzinfo=self.zone, fold=1))  # in a gap, fold=1 takes the later offset: an hour less
        change = self.change(before, at, self.offset(before))
        assert change is not None
        return change


def odd(schedule: Schedule, at: int) -> str | None:
    """What is worth saying of a firing on the day of a clock change; None on other days."""
    second = _seconds(at)
    first, last = second - 2 * _DAY, second + 2 * _DAY
    local = schedule.local
    change = local.change(first, last, local.offset(first))
    if change is None:
        return None
    old, new = _naive(change + local.offset(change - 1)), _naive(change + local.offset(change))
    wall = _naive(second + local.offset(second))
    if wall.date() != new.date() and not new <= wall < old:
        return None
    if new > old:
        lost = schedule.matching(old - _SECOND)
        if schedule.fixed and second == change and lost is not None and lost < new:
            return f"clocks go forward: {_hour(lost)} does not exist, fires at {_hour(new)}"
        return f"clocks go forward: from {_hour(old)} to {_hour(new)}"
    if new <= wall < old:
        if schedule.fixed:
            return f"clocks go back: {_hour(wall)} comes twice, fires the first time only"
        return f"clocks go back: {_hour(wall)} comes twice, this is the {'first' if second < change else 'second'}"
    return f"clocks go back: from {_hour(old)} to {_hour(new)}"


def _seconds(at: int) -> int:
    if not 0 <= at < clock.LATEST - 2 * _CENTURY * clock.SECOND:
        raise InvalidValue(f"a schedule can be asked about times from 1970 to the year 9700, not {at}")
    return at // clock.SECOND


def _stamp(local: datetime) -> int:
    """Seconds since 1970 of an aware time; of a naive one, as if it were UTC."""
    return (local.replace(tzinfo=None) - _EPOCH - (local.utcoffset() or timedelta())) // _SECOND


def _naive(seconds: int) -> datetime:
    return _EPOCH + timedelta(seconds=seconds)


def _hour(wall: datetime) -> str:
    return f"{wall:%H:%M:%S}" if wall.second else f"{wall:%H:%M}"


# ---------------------------------------------------------------------------------------------- what does it say


class _Field(NamedTuple):
    name: str
    least: int
    most: int
    names: tuple[str, ...] = ()  # of `least` and on


_MINUTE, _HOUR, _SECONDS = _Field("minute", 0, 59), _Field("hour", 0, 23), _Field("second", 0, 59)
_MONTHDAY = _Field("day of the month", 1, 31)
_MONTH = _Field("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"))
_WEEKDAY = _Field("weekday", 0, 6, ("sun", "mon", "tue", "wed", "thu", "fri", "sat"))
_FIELDS = (_MINUTE, _HOUR, _MONTHDAY, _MONTH, _WEEKDAY, _SECONDS)
_SHAPE = "Five fields: minute hour day-of-month month weekday, as in '0 9 * * mon-fri'; seconds may follow as a sixth."
_ITEM = re.compile(r"(?:\*|([a-z]+|\d{1,4})(?:-([a-z]+|\d{1,4}))?)(?:/(\d{1,4}))?", re.ASCII)
_NTH = re.compile(r"([a-z]+|\d)#([1-5])", re.ASCII)
_LAST = re.compile(r"([a-z]{3}|\d)l", re.ASCII)


@lru_cache(maxsize=1024)
def _parse(expression: str, timezone: str) -> Schedule:
    zone = _zone(timezone)
    try:
        fixed, lines = _lines(expression.lower())
    except InvalidValue as error:
        raise InvalidValue(f"schedule {expression!r}: {error}", hint=error.hint) from None
    schedule = Schedule(expression, timezone, fixed, lines, LocalClock(zone))
    schedule.next(_SOME_DAY)
    return schedule


def _lines(text: str) -> tuple[bool, tuple[str, ...]]:
    """Whether it is a fixed time, and the lines for croniter: lists of numbers, the last field seconds."""
    if text.startswith("@") and text not in ALIASES:
        near = difflib.get_close_matches(text, ALIASES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(ALIASES)}."
        raise InvalidValue(f"there is no {text!r}", hint=hint)
    texts = ALIASES.get(text, text).split()
    if len(texts) not in (5, 6):
        raise InvalidValue(f"it has {len(texts)} fields", hint=_SHAPE)
    minute, hour, monthday, month, weekday, second = (*texts, "0")[:6]
    m, h, mon, s = (
        _numbers(text.split(","), of)
        for text, of in ((minute, _MINUTE), (hour, _HOUR), (month, _MONTH), (second, _SECONDS))
    )
    days, weekdays = _days(monthday, _MONTHDAY), _days(weekday, _WEEKDAY)
    if monthday.startswith("*") or weekday.startswith("*"):
        pairs = list(product(days, weekdays))
    else:
        pairs = [*((day, "*") for day in days), *(("*", day) for day in weekdays)]
    fixed = not set("*/") & set(minute + hour)
    return fixed, tuple(f"{m} {h} {day} {mon} {week} {s}" for day, week in pairs)


def _days(text: str, of: _Field) -> list[str]:
    """A field of days as croniter can take it, in parts: one of plain numbers, one for each `L`, `fri#2`, `friL`."""
    parts, plain = [], []
    for item in text.split(","):
        if of is _MONTHDAY and item == "l":
            parts.append("l")
        elif of is _WEEKDAY and (nth := _NTH.fullmatch(item)):
            parts.append(f"{_number(nth[1], of) % 7}#{nth[2]}")
        elif of is _WEEKDAY and (last := _LAST.fullmatch(item)):
            parts.append(f"l{_number(last[1], of) % 7}")
        else:
            plain.append(item)
    return [*parts, _numbers(plain, of)] if plain else parts


def _numbers(items: Iterable[str], of: _Field) -> str:
    """The numbers that the items of one field stand for, as a list; `*` for all of them."""
    numbers: set[int] = set()
    for item in items:
        if not (part := _ITEM.fullmatch(item)):
            raise InvalidValue(f"{item!r} is not a {of.name}", hint=_SHAPE)
        first, last = of.least, of.most
        if part[1]:
            first = _number(part[1], of)
            last = _number(part[2], of) if part[2] else of.most if part[3] else first
        if of is _WEEKDAY and last == 0 < first:
            last = 7  # fri-sun
        step = int(part[3] or 1)
        if last < first or step < 1:
            hint = "Write the two parts with a comma between, as in '22-23,0-2'." if last < first else _SHAPE
            raise InvalidValue(f"the {of.name} {item!r} has no value in it", hint=hint)
        numbers.update(number % 7 if of is _WEEKDAY else number for number in range(first, last + 1, step))
    if len(numbers) > of.most - of.least:
        return "*"
    return ",".join(map(str, sorted(numbers)))


def _number(text: str, of: _Field) -> int:
    if not text.isdigit():
        if text in of.names:
            return of.least + of.names.index(text)
        hint = f"Names are {', '.join(of.names)}." if of.names else f"A {of.name} is a number."
        raise InvalidValue(f"{text!r} is not a {of.name}", hint=hint)
    most = 7 if of is _WEEKDAY else of.most
    if not of.least <= int(text) <= most:
        raise InvalidValue(f"the {of.name} {text} is not from {of.least} to {most}", hint=_SHAPE)
    return int(text)


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # the last for a folder such as "America"
        pass
    known = _known_zones()
    near = difflib.get_close_matches(name.strip().lower().replace(" ", "_"), known, n=3, cutoff=0.75)
    names = list(dict.fromkeys(zone for key in near for zone in known[key]))[:3]
    hint = f"Did you mean {' or '.join(names)}?" if names else "Zones have names like Europe/Berlin or UTC."
    raise InvalidValue(f"there is no time zone {name!r}", hint=hint)


@lru_cache(maxsize=1)
def _known_zones() -> dict[str, list[str]]:
    """Zones by their whole name and by its last part, in small letters, for people write "berlin"."""
    known: dict[str, list[str]] = {}
    for zone in sorted(zoneinfo.available_timezones()):
        for key in {zone.lower(), zone.lower().rpartition("/")[2]}:
            known.setdefault(key, []).append(zone)
    return known


# ------------------------------------------------------------------------------------------------- what is due now


class Firing(msgspec.Struct, frozen=True):
    """What becomes of one schedule: a run for the scheduled time `at`, or none (`at` is None), and its new `next_at`.

    To be written only where the stored `next_at` still is `was`, in one transaction with the run: then two leaders fire
    once. One schedule may have several in a row, each starting from the `next_at` of the one before.
    """

    workflow: str
    was: int | None
    at: int | None
    next_at: int | None
    #: `fires`; or why there is no run: `new`, `missed`, `overlap`, `clock` (it was set back), `invalid` (see `error`)
    note: Literal["fires", "new", "missed", "overlap", "clock", "invalid"] = "fires"
    error: str = ""


def due(schedules: Iterable[ScheduleRecord], now: int, late: int = LATE) -> list[Firing]:
    """What is to be written now; schedules that have nothing to do are not in it.

    - A new or edited schedule gets its next time and does not fire for the past.
    - A time that is less than `late` late fires, and so does each one after it: a slow tick loses nothing.
    - Otherwise there was an outage. Of all the times that it swallowed only the latest fires; with `catchup="skip"` not
      even that one, unless it is less than `late` late.
    - With `overlap="skip"` a time that comes while a run of the schedule is alive is passed over.
    - A clock that was set back repeats nothing; but where it was ahead by more than `CORRECTION` when the schedule last
      fired, that was a mistake, and the next time is counted from now.
    - A schedule that cannot be read (another release wrote it, its zone is gone) stops no other.
    """
    return [firing for entry in schedules for firing in _due(entry, now, late)]


def _due(entry: ScheduleRecord, now: int, late: int) -> list[Firing]:
    ahead = 0 if entry.last_at is None else entry.last_at - now
    if entry.next_at is not None and now < entry.next_at and ahead <= CORRECTION:
        return []
    try:
        schedule = Schedule.parse(entry.expression, entry.timezone)
    except InvalidValue as error:
        return [Firing(entry.workflow, entry.next_at, None, None, "invalid", str(error))]
    if entry.next_at is None:
        after = now + ahead if 0 < ahead <= CORRECTION else now
        return [Firing(entry.workflow, None, None, schedule.next(after), "new")]
    if now < entry.next_at:
        next_at = schedule.next(now)
        return [Firing(entry.workflow, entry.next_at, None, next_at, "clock")] if next_at < entry.next_at else []

    if now - entry.next_at >= late:
        latest = max(schedule.previous(now) or 0, entry.next_at)  # new zone data may have moved it
        if entry.catchup == "skip" and now - latest >= late:
            return [Firing(entry.workflow, entry.next_at, None, schedule.next(now), "missed")]
        return [_fire(entry, entry.next_at, latest, schedule.next(now), alive=entry.alive)]

    firings: list[Firing] = []
    at = entry.next_at
    while at <= now:
        next_at = schedule.next(at)
        firings.append(_fire(entry, at, at, next_at, alive=entry.alive or bool(firings)))
        at = next_at
    return firings


def _fire(entry: ScheduleRecord, was: int, at: int, next_at: int, *, alive: bool) -> Firing:
    if alive and entry.overlap == "skip":
        return Firing(entry.workflow, was, None, next_at, "overlap")
    return Firing(entry.workflow, was, at, next_at)
