"""When schedules fire, by example: expressions, the days of a clock change, outages."""

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tako_runtime import clock
from tako_runtime.cron import CORRECTION, LATE, Firing, Schedule, due, odd
from tako_runtime.errors import InvalidValue
from tako_runtime.run import ScheduleRecord

NEW_YORK, BERLIN, LORD_HOWE = "America/New_York", "Europe/Berlin", "Australia/Lord_Howe"


def at(text: str) -> int:
    """An instant; UTC unless the text has an offset."""
    return clock.instant(datetime.fromisoformat(text if text[-6] in "+-" else text + "+00:00"))


def fires(expression: str, timezone: str, start: str, end: str) -> list[str]:
    """The firings in (start, end] as UTC, found forwards, and found again backwards."""
    schedule, now, found = Schedule.parse(expression, timezone), at(start), []
    while (now := schedule.next(now)) <= at(end):
        found.append(now)
    again, before = [], at(end)
    while (earlier := schedule.previous(before)) is not None and earlier > at(start):
        again.append(earlier)
        before = earlier - 1
    assert again[::-1] == found
    return [f"{clock.moment(firing):%d %H:%M}" for firing in found]


def refused(expression: str, timezone: str | None = None) -> InvalidValue:
    with pytest.raises(InvalidValue) as caught:
        Schedule.parse(expression, timezone)
    return caught.value


# ------------------------------------------------------------------------------------------------------ expressions


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("* * * * *", "2026-01-01T00:00", "2026-01-01T00:01"),
        ("5-5 * * * *", "2026-01-01T00:05", "2026-01-01T01:05"),
        ("50/15 * * * *", "2026-01-01T00:00", "2026-01-01T00:50"),
        ("50/15 * * * *", "2026-01-01T00:50", "2026-01-01T01:50"),
        ("10-40/15 3 * * *", "2026-01-01T03:10", "2026-01-01T03:25"),
        ("10-40/15 3 * * *", "2026-01-01T03:40", "2026-01-02T03:10"),
        ("0 9 * * MON-Fri", "2026-01-02T09:00", "2026-01-05T09:00"),
        ("0 9 * * fri-sun", "2026-01-04T09:00", "2026-01-09T09:00"),
        ("0 9 * * fri-sun", "2026-01-03T09:00", "2026-01-04T09:00"),
        ("0 9 * * 0-5,7", "2026-01-02T09:00", "2026-01-04T09:00"),
        ("0 9 * * 7", "2026-01-01T00:00", "2026-01-04T09:00"),
        ("0 0 1 jan,JUL *", "2026-01-01T00:00", "2026-07-01T00:00"),
        ("0 0 L * *", "2026-02-01T00:00", "2026-02-28T00:00"),
        ("0 0 15,L * *", "2028-02-16T00:00", "2028-02-29T00:00"),
        ("0 0 * * fri#2", "2026-01-01T00:00", "2026-01-09T00:00"),
        ("0 0 * * friL", "2026-01-01T00:00", "2026-01-30T00:00"),
        ("0 0 * * mon,5L", "2026-01-27T00:00", "2026-01-30T00:00"),
        ("@hourly", "2026-01-01T00:00", "2026-01-01T01:00"),
        ("@daily", "2026-01-01T00:00", "2026-01-02T00:00"),
        ("@midnight", "2026-01-01T00:00", "2026-01-02T00:00"),
        ("@weekly", "2026-01-01T00:00", "2026-01-04T00:00"),
        ("@monthly", "2026-01-01T00:00", "2026-02-01T00:00"),
        ("@yearly", "2026-01-01T00:00", "2027-01-01T00:00"),
        ("@Annually", "2026-01-01T00:00", "2027-01-01T00:00"),
        ("  0\t9  * * * ", "2026-01-01T00:00", "2026-01-01T09:00"),
    ],
)
def test_an_expression_fires_when_crontab_says(expression: str, after: str, expected: str) -> None:
    assert clock.iso(Schedule.parse(expression).next(at(after))) == clock.iso(at(expected))


def test_two_day_fields_both_have_to_match_where_one_begins_with_a_star_and_else_either() -> None:
    january = ("2026-01-01T00:01", "2026-01-31T23:59")
    assert fires("0 0 13 * fri", "UTC", *january) == [f"{day:02} 00:00" for day in (2, 9, 13, 16, 23, 30)]
    assert fires("0 0 */10 * fri", "UTC", *january) == []
    assert fires("0 0 */2 * fri", "UTC", *january) == ["09 00:00", "23 00:00"]
    assert fires("0 0 1-7 * */3", "UTC", *january) == ["03 00:00", "04 00:00", "07 00:00"]
    assert fires("0 0 13 * fri#1", "UTC", *january) == ["02 00:00", "13 00:00"]
    assert fires("0 0 31 2 mon", "UTC", *january) == []


def test_a_sixth_field_at_the_end_is_seconds() -> None:
    every_second, twice = Schedule.parse("* * * * * *"), Schedule.parse("59 23 * * * 0,30")
    noon = at("2026-01-01T12:00")
    assert every_second.next(noon) == noon + clock.SECOND
    assert twice.next(noon) == at("2026-01-01T23:59")
    assert twice.next(at("2026-01-01T23:59")) == at("2026-01-01T23:59:30")
    assert twice.previous(noon) == at("2025-12-31T23:59:30")


def test_next_is_strictly_after_and_previous_includes_the_instant_to_the_microsecond() -> None:
    schedule, nine = Schedule.parse("0 9 * * *"), at("2026-01-02T09:00")
    assert schedule.next(nine) == nine + clock.DAY
    assert schedule.next(nine - 1) == nine
    assert schedule.next(nine + 1) == nine + clock.DAY
    assert schedule.previous(nine) == nine
    assert schedule.previous(nine + 1) == nine
    assert schedule.previous(nine - 1) == nine - clock.DAY


def test_a_rare_schedule_is_found_in_both_directions() -> None:
    leap_sunday = Schedule.parse("*/20 0 29 2 */7", BERLIN)
    assert leap_sunday.next(at("2033-01-01T00:00")) == at("2060-02-28T23:00")
    assert leap_sunday.previous(at("2033-01-01T00:00")) == at("2032-02-28T23:40")
    assert Schedule.parse("0 0 29 2 *").previous(at("2027-01-01T00:00")) == at("2024-02-29T00:00")
    fifth_friday = Schedule.parse("0 0 * 2 fri#5")
    assert fifth_friday.next(at("2026-01-01T00:00")) == at("2036-02-29T00:00")
    assert fifth_friday.previous(at("2026-01-01T00:00")) == at("2008-02-29T00:00")


@pytest.mark.parametrize(
    ("expression", "message", "hint"),
    [
        ("", "it has 0 fields", "Five fields: minute hour"),
        ("0 9 * *", "it has 4 fields", "Five fields: minute hour"),
        ("0 9 * * * * *", "it has 7 fields", "Five fields: minute hour"),
        ("60 * * * *", "the minute 60 is not from 0 to 59", "Five fields"),
        ("0 24 * * *", "the hour 24 is not from 0 to 23", "Five fields"),
        ("0 0 0 * *", "the day of the month 0 is not from 1 to 31", "Five fields"),
        ("0 0 * 13 *", "the month 13 is not from 1 to 12", "Five fields"),
        ("0 0 * * 8", "the weekday 8 is not from 0 to 7", "Five fields"),
        ("* * * * * 60", "the second 60 is not from 0 to 59", "Five fields"),
        ("0 0 * * mno", "'mno' is not a weekday", "sun, mon, tue"),
        ("0 0 * * jan", "'jan' is not a weekday", "sun, mon, tue"),
        ("mon * * * *", "'mon' is not a minute", "is a number"),
        ("-1 * * * *", "'-1' is not a minute", "Five fields"),
        ("1,,2 * * * *", "'' is not a minute", "Five fields"),
        ("1.5 * * * *", "'1.5' is not a minute", "Five fields"),
        ("٣ * * * *", "'٣' is not a minute", "Five fields"),  # a digit, but not cron's
        (f"{'9' * 5000} * * * *", "is not a minute", "Five fields"),
        ("*/0 * * * *", "the minute '*/0' has no value", "Five fields"),
        ("0 22-2 * * *", "the hour '22-2' has no value", "a comma between"),
        ("0 0 ? * *", "'?' is not a day of the month", "Five fields"),
        ("0 0 * * fri#6", "'fri#6' is not a weekday", "Five fields"),
        ("r * * * *", "'r' is not a minute", "is a number"),
        ("@dayly", "there is no '@dayly'", "Did you mean @daily?"),
        ("@reboot", "there is no '@reboot'", "There are @hourly"),
        ("0 0 31 2 *", "never fires", "No date has all"),
        ("0 0 30 2 */7", "never fires", "No date has all"),
        ("0 0 31 4,6,9,11 *", "never fires", "No date has all"),
    ],
)
def test_a_wrong_expression_is_refused_with_what_is_wrong_and_what_to_do(
    expression: str, message: str, hint: str
) -> None:
    error = refused(expression)
    assert f"schedule {expression!r}" in str(error)
    assert message in str(error)
    assert hint in error.hint


def test_an_interval_that_only_names_times_that_its_zone_skips_never_fires() -> None:
    assert "never fires" in str(refused("*/30 2 8-14 3 */7", NEW_YORK))
    assert Schedule.parse("*/30 2 8-14 3 */7", "UTC").next(at("2026-01-01T00:00")) == at("2026-03-08T02:00")


@pytest.mark.parametrize(
    ("timezone", "hint"),
    [
        ("Europe/Berln", "Europe/Berlin"),
        ("europe/berlin", "Europe/Berlin"),
        ("Berlin", "Europe/Berlin"),
        ("new york", "America/New_York"),
        ("Mars/Olympus_Mons", "Zones have names like"),
        ("America", ""),
        ("../etc/passwd", ""),
        ("", "Zones have names like"),
    ],
)
def test_an_unknown_time_zone_is_refused_with_the_nearest_names(timezone: str, hint: str) -> None:
    error = refused("0 0 * * *", timezone)
    assert f"there is no time zone {timezone!r}" in str(error)
    assert hint in error.hint


def test_what_is_not_text_is_refused() -> None:
    assert "a schedule is text" in str(refused(15))  # type: ignore[arg-type]
    assert "a time zone is text" in str(refused("0 0 * * *", 2))  # type: ignore[arg-type]


def test_an_instant_outside_of_what_calendars_can_do_is_refused() -> None:
    for instant in (-1, clock.LATEST):
        with pytest.raises(InvalidValue, match="from 1970 to the year 9700"):
            Schedule.parse("* * * * *").next(instant)


# ---------------------------------------------------------------------------------------------- clocks go forward

# New York: 8 March 2026, 02:00 -> 03:00 at 07:00 UTC.  Berlin: 29 March 2026, 02:00 -> 03:00 at 01:00 UTC.
# Lord Howe: 4 October 2026, 02:00 -> 02:30 at 15:30 UTC of the day before.
FORWARD = {
    NEW_YORK: ("2026-03-08T05:59", "2026-03-08T09:00"),
    BERLIN: ("2026-03-28T23:59", "2026-03-29T03:00"),
    LORD_HOWE: ("2026-10-03T14:29", "2026-10-03T17:00"),
}


@pytest.mark.parametrize(
    ("expression", "timezone", "expected"),
    [
        ("30 1 * * *", NEW_YORK, ["08 06:30"]),
        ("0 2 * * *", NEW_YORK, ["08 07:00"]),
        ("30 2 * * *", NEW_YORK, ["08 07:00"]),
        ("30 2 * * sun", NEW_YORK, ["08 07:00"]),
        ("0,30 2,3 * * *", NEW_YORK, ["08 07:00", "08 07:30"]),
        ("0 3 * * *", NEW_YORK, ["08 07:00"]),
        ("0 * * * *", NEW_YORK, ["08 06:00", "08 07:00", "08 08:00", "08 09:00"]),
        ("*/30 * * * *", NEW_YORK, [f"08 {h:02}:{m:02}" for h in (6, 7, 8, 9) for m in (0, 30)][:-1]),
        ("0 */2 * * *", NEW_YORK, ["08 08:00"]),
        ("0/30 1-3 * * *", NEW_YORK, ["08 06:00", "08 06:30", "08 07:00", "08 07:30"]),
        ("30 2 * * *", BERLIN, ["29 01:00"]),
        ("0 3 * * *", BERLIN, ["29 01:00"]),
        ("30 * * * *", BERLIN, ["29 00:30", "29 01:30", "29 02:30"]),
        ("15 2 * * *", LORD_HOWE, ["03 15:30"]),
        ("30 2 * * *", LORD_HOWE, ["03 15:30"]),
        ("45 2 * * *", LORD_HOWE, ["03 15:45"]),
        (
            "*/15 * * * *",
            LORD_HOWE,
            [*[f"03 {h}:{m:02}" for h in (14, 15, 16) for m in (0, 15, 30, 45)][2:], "03 17:00"],
        ),
        ("0 * * * *", LORD_HOWE, ["03 14:30", "03 16:00", "03 17:00"]),
    ],
)
def test_on_the_day_when_clocks_go_forward_a_fixed_time_fires_once_and_an_interval_goes_on(
    expression: str, timezone: str, expected: list[str]
) -> None:
    assert fires(expression, timezone, *FORWARD[timezone]) == expected


# ------------------------------------------------------------------------------------------------- clocks go back

# New York: 1 November 2026, 02:00 -> 01:00 at 06:00 UTC.  Berlin: 25 October 2026, 03:00 -> 02:00 at 01:00 UTC.
# Lord Howe: 5 April 2026, 02:00 -> 01:30 at 15:00 UTC of the day before.
BACK = {
    NEW_YORK: ("2026-11-01T04:59", "2026-11-01T07:00"),
    BERLIN: ("2026-10-24T23:59", "2026-10-25T02:00"),
    LORD_HOWE: ("2026-04-04T13:59", "2026-04-04T16:00"),
}


@pytest.mark.parametrize(
    ("expression", "timezone", "expected"),
    [
        ("13 1 * * *", NEW_YORK, ["01 05:13"]),
        ("0 1 * * *", NEW_YORK, ["01 05:00"]),
        ("0 2 * * *", NEW_YORK, ["01 07:00"]),
        ("13 1 * * sun", NEW_YORK, ["01 05:13"]),
        ("0,30 1,2 * * *", NEW_YORK, ["01 05:00", "01 05:30", "01 07:00"]),
        ("0 * * * *", NEW_YORK, ["01 05:00", "01 06:00", "01 07:00"]),
        ("*/20 * * * *", NEW_YORK, [f"01 {h:02}:{m:02}" for h in (5, 6) for m in (0, 20, 40)] + ["01 07:00"]),
        ("*/20 1 * * *", NEW_YORK, [f"01 {h:02}:{m:02}" for h in (5, 6) for m in (0, 20, 40)]),
        ("30 2 * * *", BERLIN, ["25 00:30"]),
        ("0 3 * * *", BERLIN, ["25 02:00"]),
        ("30 * * * *", BERLIN, ["25 00:30", "25 01:30"]),
        ("45 1 * * *", LORD_HOWE, ["04 14:45"]),
        ("15 1 * * *", LORD_HOWE, ["04 14:15"]),
        ("0 2 * * *", LORD_HOWE, ["04 15:30"]),
        ("*/15 * * * *", LORD_HOWE, [f"04 {h}:{m:02}" for h in (14, 15) for m in (0, 15, 30, 45)] + ["04 16:00"]),
        ("*/30 1 * * *", LORD_HOWE, ["04 14:00", "04 14:30", "04 15:00"]),
        ("0 * * * *", LORD_HOWE, ["04 14:00", "04 15:30"]),
    ],
)
def test_on_the_day_when_clocks_go_back_a_fixed_time_fires_once_and_an_interval_goes_on(
    expression: str, timezone: str, expected: list[str]
) -> None:
    assert fires(expression, timezone, *BACK[timezone]) == expected


@pytest.mark.parametrize("expression", ["30 2 * * *", "*/15 * * * *", "0 * * * *"])
@pytest.mark.parametrize("day", [start[:10] for start, _ in (*FORWARD.values(), *BACK.values())])
def test_in_utc_no_day_is_odd(expression: str, day: str) -> None:
    begin = at(f"{day}T00:00")
    schedule = Schedule.parse(expression)
    minutes = {"30 2 * * *": [150], "*/15 * * * *": range(0, 1440, 15), "0 * * * *": range(0, 1440, 60)}[expression]
    now, expected = begin - 1, [begin + minute * clock.MINUTE for minute in minutes]
    for firing in expected:
        now = schedule.next(now)
        assert now == firing
        assert odd(schedule, now) is None
    assert schedule.next(now) >= begin + clock.DAY


def test_the_last_second_before_a_change_and_the_first_after_it_are_both_seen() -> None:
    for change in (at("2026-03-08T07:00"), at("2026-11-01T06:00")):
        before, after = (Schedule.parse(f"* * * * * {second}", NEW_YORK) for second in (59, 0))
        assert before.previous(change) == change - clock.SECOND == before.next(change - 2 * clock.SECOND)
        assert after.next(change - 1) == change == after.previous(change + 1)


def test_a_fixed_time_asked_for_in_the_second_pass_is_the_next_days() -> None:
    schedule = Schedule.parse("50 1 * * *", NEW_YORK)
    assert schedule.next(at("2026-11-01T06:10")) == at("2026-11-02T06:50")
    assert schedule.previous(at("2026-11-01T06:10")) == at("2026-11-01T05:50")


def test_a_day_that_begins_with_a_gap_still_fires_at_midnight_once() -> None:
    # Cairo, 24 April 2026: 00:00 -> 01:00.
    assert fires("@daily", "Africa/Cairo", "2026-04-22T23:00", "2026-04-25T20:00") == ["23 22:00", "24 21:00"]


def test_a_day_that_a_zone_left_out_altogether_fires_once_for_it() -> None:
    # Apia crossed the date line: after 29 December 2011 came the 31st.
    wanted = ["29 22:00", "30 10:00", "30 22:00"]
    assert fires("0 12 * * *", "Pacific/Apia", "2011-12-29T12:00", "2011-12-31T10:00") == wanted


def test_an_odd_day_says_so_with_every_firing_on_it() -> None:
    def note(expression: str, timezone: str, instant: str) -> str | None:
        schedule = Schedule.parse(expression, timezone)
        assert schedule.previous(at(instant)) == at(instant), "not a firing"
        return odd(schedule, at(instant))

    lost = "clocks go forward: 02:30 does not exist, fires at 03:00"
    assert note("30 2 * * *", NEW_YORK, "2026-03-08T07:00") == lost
    assert note("0 3 * * *", NEW_YORK, "2026-03-08T07:00") == "clocks go forward: from 02:00 to 03:00"
    assert note("0 9 * * *", NEW_YORK, "2026-03-08T13:00") == "clocks go forward: from 02:00 to 03:00"
    assert note("*/15 * * * *", NEW_YORK, "2026-03-08T07:00") == "clocks go forward: from 02:00 to 03:00"
    once = "clocks go back: 01:13 comes twice, fires the first time only"
    assert note("13 1 * * *", NEW_YORK, "2026-11-01T05:13") == once
    assert note("0 9 * * *", NEW_YORK, "2026-11-01T14:00") == "clocks go back: from 02:00 to 01:00"
    first, second = (f"clocks go back: 01:30 comes twice, this is the {which}" for which in ("first", "second"))
    assert note("*/15 * * * *", NEW_YORK, "2026-11-01T05:30") == first
    assert note("*/15 * * * *", NEW_YORK, "2026-11-01T06:30") == second
    assert note("*/15 * * * *", NEW_YORK, "2026-11-01T07:00") == "clocks go back: from 02:00 to 01:00"
    half = "clocks go forward: 02:15:10 does not exist, fires at 02:30"
    assert note("15 2 * * * 10", LORD_HOWE, "2026-10-03T15:30") == half
    midnight = "clocks go forward: 00:00 does not exist, fires at 01:00"
    assert note("@daily", "Africa/Cairo", "2026-04-23T22:00") == midnight
    assert note("0 12 * * *", "Africa/Cairo", "2026-04-23T10:00") is None
    # Scoresbysund, 25 October 2026: at 00:00 back to 23:00 of the day before.
    late = "clocks go back: 23:15 comes twice, fires the first time only"
    assert note("15 23 * * *", "America/Scoresbysund", "2026-10-25T00:15") == late
    # St John's, 7 November 2010: at 00:01 back to 23:01 of the day before.
    twice = "clocks go back: 00:00 comes twice, fires the first time only"
    assert note("@daily", "America/St_Johns", "2010-11-07T02:30") == twice
    for instant in ("2026-03-07T14:00", "2026-03-09T13:00", "2026-10-31T13:00", "2026-11-02T14:00"):
        assert note("0 9 * * *", NEW_YORK, instant) is None


# ------------------------------------------------------------------------------------------------------------ due

NOON = at("2026-01-01T12:00")


def record(
    workflow: str,
    expression: str,
    timezone: str = "UTC",
    *,
    catchup: str = "latest",
    overlap: str = "allow",
    next_at: int | None = None,
    last_at: int | None = None,
    alive: bool = False,
) -> ScheduleRecord:
    return ScheduleRecord(
        workflow, "default", expression, timezone, catchup, overlap, next_at=next_at, last_at=last_at, alive=alive
    )


daily = partial(record, "report", "0 12 * * *")


def test_a_new_schedule_gets_its_next_time_and_does_not_fire_for_the_past() -> None:
    assert due([daily()], NOON) == [Firing("report", None, None, NOON + clock.DAY, "new")]
    assert due([daily()], NOON - 1) == [Firing("report", None, None, NOON, "new")]


def test_a_schedule_fires_for_its_time_once_that_has_come_and_not_before() -> None:
    entry = daily(next_at=NOON)
    assert due([entry], NOON - 1) == []
    assert due([entry], NOON) == [Firing("report", NOON, NOON, NOON + clock.DAY)]
    assert due([entry], NOON + LATE - 1) == [Firing("report", NOON, NOON, NOON + clock.DAY)]


def test_after_an_outage_only_the_latest_missed_time_fires() -> None:
    entry = daily(next_at=NOON)
    back = NOON + 3 * clock.DAY + clock.HOUR
    assert due([entry], back) == [Firing("report", NOON, NOON + 3 * clock.DAY, NOON + 4 * clock.DAY)]
    busy = record("tick", "* * * * * *", next_at=NOON)
    assert due([busy], back) == [Firing("tick", NOON, back, back + clock.SECOND)]


def test_with_catchup_skip_none_of_the_missed_times_fires_but_one_that_is_only_late_does() -> None:
    entry = daily(next_at=NOON, catchup="skip")
    assert due([entry], NOON + LATE) == [Firing("report", NOON, None, NOON + clock.DAY, "missed")]
    assert due([entry], NOON + LATE - 1) == [Firing("report", NOON, NOON, NOON + clock.DAY)]
    third = NOON + 3 * clock.DAY
    assert due([entry], third + LATE) == [Firing("report", NOON, None, third + clock.DAY, "missed")]
    assert due([entry], third + LATE - 1) == [Firing("report", NOON, third, third + clock.DAY)]


def test_a_slow_tick_loses_none_of_the_times_of_a_schedule_of_seconds() -> None:
    entry = record("tick", "* * * * * *", next_at=NOON)
    seconds = [NOON + n * clock.SECOND for n in range(4)]
    expected = [Firing("tick", was, was, was + clock.SECOND) for was in seconds[:3]]
    assert due([entry], seconds[3] - 1) == expected


def test_with_overlap_skip_a_live_run_is_not_joined_by_another() -> None:
    entry = daily(next_at=NOON, overlap="skip")
    assert due([entry], NOON) == [Firing("report", NOON, NOON, NOON + clock.DAY)]
    alive = daily(next_at=NOON, overlap="skip", alive=True)
    assert due([alive], NOON) == [Firing("report", NOON, None, NOON + clock.DAY, "overlap")]
    outage = NOON + 3 * clock.DAY + clock.HOUR
    assert due([alive], outage) == [Firing("report", NOON, None, NOON + 4 * clock.DAY, "overlap")]
    assert due([daily(next_at=NOON, alive=True)], NOON) == [Firing("report", NOON, NOON, NOON + clock.DAY)]
    seconds = record("tick", "* * * * * *", overlap="skip", next_at=NOON)
    assert [firing.note for firing in due([seconds], NOON + 2 * clock.SECOND)] == ["fires", "overlap", "overlap"]


def test_a_clock_that_was_set_back_repeats_nothing() -> None:
    fired = daily(next_at=NOON + clock.DAY, last_at=NOON)
    assert due([fired], NOON - clock.HOUR) == []
    edited = daily(last_at=NOON)
    assert due([edited], NOON - clock.HOUR) == [Firing("report", None, None, NOON + clock.DAY, "new")]


def test_a_clock_that_had_been_far_ahead_does_not_silence_a_schedule() -> None:
    wrong = NOON + 3650 * clock.DAY
    stuck = daily(next_at=wrong + clock.DAY, last_at=wrong)
    assert due([stuck], NOON - 1) == [Firing("report", wrong + clock.DAY, None, NOON, "clock")]
    mended = daily(next_at=NOON, last_at=wrong)
    assert due([mended], NOON - 1) == []
    assert due([mended], NOON) == [Firing("report", NOON, NOON, NOON + clock.DAY)]
    assert due([daily(last_at=wrong)], NOON - 1) == [Firing("report", None, None, NOON, "new")]


def test_a_schedule_that_cannot_be_read_is_told_and_stops_no_other() -> None:
    broken = record("old", "0 12 * * *", "Europe/Atlantis", next_at=NOON)
    told, fired = due([broken, daily(next_at=NOON)], NOON)
    assert fired == Firing("report", NOON, NOON, NOON + clock.DAY)
    assert (told.workflow, told.was, told.at, told.next_at, told.note) == ("old", NOON, None, None, "invalid")
    assert "Europe/Atlantis" in told.error


steps = st.one_of(
    st.timedeltas(timedelta(0), timedelta(minutes=5)),
    st.timedeltas(timedelta(0), timedelta(days=3)),
    st.timedeltas(-timedelta(hours=2), timedelta(0)),
)


@settings(deadline=None, max_examples=60)
@given(
    expression=st.sampled_from(
        ["* * * * *", "*/7 * * * *", "30 2 * * *", "0 */2 * * *", "* * * * * */20", "30 1 * * *"]
    ),
    timezone=st.sampled_from(["UTC", NEW_YORK, BERLIN, LORD_HOWE]),
    catchup=st.sampled_from(["latest", "skip"]),
    start=st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)),  # noqa: DTZ001 -- made UTC below
    moves=st.lists(steps, min_size=1, max_size=25),
)
def test_however_the_clock_moves_each_time_fires_once_in_order_and_never_early(
    expression: str, timezone: str, catchup: str, start: datetime, moves: list[timedelta]
) -> None:
    schedule = Schedule.parse(expression, timezone)
    now = newest = clock.instant(start.replace(tzinfo=UTC))
    entry = record("w", expression, timezone, catchup=catchup)
    fired: list[int] = []
    for move in [timedelta(0), *moves]:
        now = max(now + move // timedelta(microseconds=1), newest - CORRECTION)
        waiting = entry.next_at
        firings = due([entry], now)
        if max(now - newest, 0) < LATE and waiting is not None and newest < waiting <= now:
            assert firings[0].at == waiting, "a time that came while the clock was watched did not fire"
        elif waiting is not None and now - waiting >= LATE:
            assert len(firings) == 1
        for firing in firings:
            assert firing.was == entry.next_at
            assert firing.next_at is not None
            if firing.at is not None:
                assert schedule.previous(firing.at) == firing.at <= now
                assert catchup == "latest" or now - firing.at < LATE
                fired.append(firing.at)
            entry = structs.replace(entry, next_at=firing.next_at, last_at=firing.at or entry.last_at)
        assert entry.next_at is not None
        assert entry.next_at > now
        newest = max(newest, now)
    assert fired == sorted(set(fired))
