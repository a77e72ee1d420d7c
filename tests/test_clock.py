"""Durations, instants, and how both are written."""

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from conftest import FakeClock
from hypothesis import example, given
from hypothesis import strategies as st

from tako_runtime import clock
from tako_runtime.clock import DAY, HOUR, LATEST, MINUTE, SECOND
from tako_runtime.errors import InvalidValue


@pytest.mark.parametrize(
    ("given", "micros"),
    [
        (timedelta(days=3), 3 * DAY),
        (timedelta(microseconds=1), 1),
        (90, 90 * SECOND),
        (0.25, SECOND // 4),
        (0, 0),
        (-0.0, 0),
        ("500ms", SECOND // 2),
        ("7us", 7),
        ("90s", 90 * SECOND),
        ("15m", 15 * MINUTE),
        ("1h30m", HOUR + 30 * MINUTE),
        ("1h 30m", HOUR + 30 * MINUTE),
        ("1.5h", HOUR + 30 * MINUTE),
        ("3d", 3 * DAY),
        ("2w", 14 * DAY),
        (" 2 D ", 2 * DAY),
    ],
)
def test_a_duration_is_a_timedelta_seconds_or_text(given: clock.Duration, micros: int) -> None:
    assert clock.duration(given) == micros


@pytest.mark.parametrize(
    "given",
    [
        math.nan, math.inf, -math.inf, 10**40, 1e300, "9" * 400 + "d", timedelta.max,
        "", " ", "-", "3", "d", "3x", "3d!", "x3d", "3d4", "1e3s", "--3d", "nan", "inf", "٣x",
        None, True, False, b"3d", [3], datetime(2026, 1, 1, tzinfo=UTC),
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused_by_name(given: Any) -> None:
    with pytest.raises(InvalidValue, match="the pause"):
        clock.duration(given, "the pause")


def test_a_text_that_is_no_duration_is_answered_with_how_to_write_one() -> None:
    with pytest.raises(InvalidValue) as caught:
        clock.duration("soon", "delay")
    assert "'soon'" in str(caught.value)
    assert "1h30m" in caught.value.hint


@pytest.mark.parametrize("given", [-1, -0.001, "-3d", timedelta(seconds=-1), timedelta.min])
def test_a_negative_duration_is_refused_unless_it_makes_sense_there(given: clock.Duration) -> None:
    with pytest.raises(InvalidValue, match="at least 0s"):
        clock.duration(given)
    if given != timedelta.min:
        assert clock.duration(given, least=None) < 0


def test_a_duration_shorter_than_the_least_is_refused_with_the_least_in_words() -> None:
    assert clock.duration("1ms", least=1_000) == 1_000
    with pytest.raises(InvalidValue, match="timeout must be at least 1ms"):
        clock.duration("999us", "timeout", least=1_000)


def test_the_longest_duration_reaches_the_year_9999_and_no_further() -> None:
    assert clock.duration(timedelta(microseconds=LATEST)) == LATEST
    with pytest.raises(InvalidValue, match="9999"):
        clock.duration(timedelta(microseconds=LATEST + 1))


def test_an_instant_is_the_same_in_every_time_zone() -> None:
    utc = datetime(2026, 11, 22, 12, 0, 0, 1, tzinfo=UTC)
    there = utc.astimezone(timezone(timedelta(hours=-9, minutes=-30)))
    assert clock.instant(utc) == clock.instant(there)
    assert clock.instant(utc) % SECOND == 1


@pytest.mark.parametrize("given", [datetime(2026, 1, 1), datetime(2026, 1, 1).date(), "2026-01-01T00:00:00Z", 0, None])  # noqa: DTZ001
def test_what_names_no_instant_is_refused_by_name(given: Any) -> None:
    with pytest.raises(InvalidValue, match="run_at"):
        clock.instant(given, "run_at")


def test_a_naive_datetime_is_answered_with_what_to_write() -> None:
    with pytest.raises(InvalidValue) as caught:
        clock.instant(datetime(2026, 1, 1))  # noqa: DTZ001
    assert "no time zone" in str(caught.value)
    assert "UTC" in caught.value.hint


@given(st.datetimes(timezones=st.just(UTC), max_value=datetime(9999, 12, 31)))  # noqa: DTZ001
def test_an_instant_becomes_the_same_moment_again(moment: datetime) -> None:
    micros = clock.instant(moment)
    assert clock.moment(micros) == moment
    if moment.year >= 1000:  # what strftime pads is the C library's choice before that
        assert datetime.fromisoformat(clock.iso(micros)) == moment


@given(st.integers(0, LATEST))
@example(999_999)
def test_what_spell_writes_reads_back_to_nearly_the_same_duration(micros: int) -> None:
    spelled = clock.spell(micros)
    # Two units, or three digits of one: never a week off where it says days, never a tenth off anywhere.
    assert math.isclose(clock.duration(spelled), micros, rel_tol=0.1, abs_tol=0.6)
    assert clock.spell(-micros) == (f"-{spelled}" if micros else "0s")


@pytest.mark.parametrize(
    ("micros", "spelled"),
    [
        (0, "0s"),
        (1_500, "1.5ms"),
        (999_999, "1s"),
        (12_340_000, "12.3s"),
        (90 * SECOND, "1m30s"),
        (HOUR - 1, "1h"),
        (2 * HOUR + 5 * SECOND, "2h"),
        (DAY + HOUR + MINUTE, "1d1h"),
    ],
)
def test_a_duration_is_spelled_as_people_write_it(micros: int, spelled: str) -> None:
    assert clock.spell(micros) == spelled


def test_the_system_clock_counts_microseconds_since_1970() -> None:
    now = clock.SystemClock().now()
    assert clock.instant(datetime(2020, 1, 1, tzinfo=UTC)) < now < LATEST


def test_the_clock_of_the_tests_moves_only_when_told() -> None:
    still = FakeClock(5)
    assert (still.now(), still.now()) == (5, 5)
    assert still.advance(3) == still.now() == 8


def test_clocks_that_differ_by_less_than_a_second_count_as_agreeing() -> None:
    standard = clock.Standard()
    for off in (0, 999_000, -999_000):
        assert not standard.heed(off, asked=-500, answered=500)
    assert standard.ahead == 0


@pytest.mark.parametrize("off", [2 * clock.SECOND, -10 * clock.MINUTE, 40 * clock.DAY])
def test_a_clock_that_is_off_is_set_right_until_it_agrees_again(off: int) -> None:
    standard = clock.Standard()
    assert standard.heed(1_000 + off, asked=0, answered=2_000)
    assert standard.ahead == off
    assert not standard.heed(1_000 + off + 900_000, asked=0, answered=2_000), "a little more is not told again"
    assert standard.ahead == off
    assert standard.heed(1_000, asked=0, answered=2_000)
    assert standard.ahead == 0


def test_an_answer_that_took_long_accuses_no_clock() -> None:
    standard = clock.Standard()
    assert not standard.heed(0, asked=0, answered=30 * clock.SECOND)
    assert not standard.heed(30 * clock.SECOND, asked=0, answered=30 * clock.SECOND)
    assert standard.heed(32 * clock.SECOND, asked=0, answered=30 * clock.SECOND)
