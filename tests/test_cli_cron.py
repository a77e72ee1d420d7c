"""`tako cron`: which schedules there are, when they fire, and firing one by hand."""

import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli import at_terminal, developing, document, done, make_project, plain, run_of, tako
from conftest import until
from workers import now

from tako_runtime import clock, cron, timetable
from tako_runtime.run import ScheduleRecord

# They run processes of their own.
pytestmark = pytest.mark.slow

FLOWS = """
    from tako_runtime import Step, workflow

    @workflow("daily-report", schedule="0 9 * * mon-fri", timezone="Europe/Berlin", group="reports", overlap="skip")
    async def daily_report(step: Step) -> str:
        return step.scheduled_at.isoformat()

    @workflow("spring", schedule="30 2 * mar sun#2", timezone="America/New_York", catchup="skip")
    def spring(step) -> None: ...

    @workflow("plain")
    def plain(step) -> None: ...
"""

SECONDS = """
    from tako_runtime import workflow

    @workflow("tick", schedule="* * * * * *")
    def tick(step) -> None: ...
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", FLOWS)


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_ls_has_what_the_workflows_declare_and_their_next_times_where_nothing_runs(project: Path) -> None:
    answer = document("cron", "ls", cwd=project)
    report, spring = answer["schedules"]
    ahead = report.pop("next")
    assert report == {
        "workflow": "daily-report", "expression": "0 9 * * mon-fri", "timezone": "Europe/Berlin", "group": "reports",
        "catchup": "latest", "overlap": "skip", "overdue": None, "last": None, "last_run": None, "error": None,
        "local": False,
    }  # fmt: skip
    assert instant(ahead["local"]) == instant(ahead["at"]) > clock.moment(now())
    assert (instant(ahead["local"]).hour, ahead["at"][-1]) == (9, "Z")
    assert spring["next"]["note"] == "clocks go forward: 02:30 does not exist, fires at 03:00"
    assert answer["mistakes"] == []


def test_ls_shows_what_the_supervisor_that_runs_has_taken_over_and_the_last_run(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop", SECONDS)
    file = project / "workflows" / "flows.py"
    with developing(project) as dev:
        fired = dev.wait_for("cron.fired")
        dev.had("run.succeeded", lambda event: event["run"] == fired["run"])
        file.write_text(file.read_text().replace("* * * * * *", "0 0 1 1 *"))
        dev.wait_for("code.reloaded")
        until(lambda: document("cron", "ls", cwd=project)["schedules"][0]["expression"] == "0 0 1 1 *")
        [one] = document("cron", "ls", cwd=project)["schedules"]
        assert one["last"]["at"] >= fired["scheduled_at"]
        assert one["last_run"]["status"] in ("pending", "running", "succeeded")
        dev.send(signal.SIGINT)
        assert dev.ended() == 0
    [then] = document("cron", "ls", cwd=project)["schedules"]
    assert then["last_run"]["id"] == one["last_run"]["id"]
    assert "last  " in done("cron", "ls", cwd=project)


def test_ls_ends_with_1_and_names_a_file_that_cannot_be_read_and_an_expression(project: Path) -> None:
    (project / "workflows" / "broken.py").write_text("import nowhere\n")
    (project / "workflows" / "wrong.py").write_text(
        'from tako_runtime import workflow\n\n@workflow("wrong", schedule="0 25 * * *")\ndef wrong(step): ...\n'
    )
    answer = document("cron", "ls", cwd=project, code=1)
    by_name = {one["workflow"]: one for one in answer["schedules"]}
    assert set(by_name) == {"daily-report", "spring", "wrong"}
    assert "the hour 25 is not from 0 to 23" in by_name["wrong"]["error"]
    assert by_name["wrong"]["next"] is None
    assert [Path(one["file"]).name for one in answer["mistakes"]] == ["broken.py", "wrong.py"]
    told = tako("cron", "ls", cwd=project)
    assert "broken.py:1: cannot be imported" in told.stderr
    assert "  schedule '0 25 * * *': the hour 25" in told.stdout


@pytest.mark.parametrize("columns", [80, 60])
def test_ls_and_next_fit_the_terminal(columns: int, project: Path) -> None:
    for words in (["ls"], ["next", "daily-report"], ["next", "spring"]):
        code, shown = at_terminal("cron", *words, cwd=project, columns=columns, NO_COLOR="1")
        assert code == 0
        assert max(map(len, plain(shown).splitlines())) <= columns, shown
        assert ("Europe/Berlin" in shown) or ("America/New_York" in shown)


def test_without_a_schedule_ls_says_how_one_is_made(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop", "")
    assert document("cron", "ls", cwd=project) == {"schedules": [], "mistakes": []}
    assert "schedule=" in tako("cron", "ls", cwd=project).stderr


def test_next_has_as_many_times_as_asked_for_in_both_clocks_and_marks_the_odd_days(project: Path) -> None:
    times = document("cron", "next", "spring", "-n", "3", cwd=project)["next"]
    assert len(times) == 3
    for time in times:  # the second Sunday of March is when New York's clocks go forward
        assert time["at"][11:16] == "07:00"
        assert time["local"][11:] == "03:00:00-04:00"
        assert time["note"] == "clocks go forward: 02:30 does not exist, fires at 03:00"
    shown = done("cron", "next", "spring", "-n", "3", cwd=project)
    assert shown.count("02:30 does not exist") == 3
    assert shown.count("03:00 -04:00  07:00 UTC") == 3
    assert len(document("cron", "next", "daily-report", cwd=project)["next"]) == 5


def test_next_of_a_name_that_is_no_schedule_names_the_nearest(project: Path) -> None:
    answer = document("cron", "next", "daily-reprot", cwd=project, code=4)
    assert answer["error"]["message"] == "no schedule 'daily-reprot'"
    assert answer["error"]["hint"] == "Did you mean daily-report?"
    assert tako("cron", "next", "spring", "-n", "0", cwd=project).returncode == 2


def test_fire_starts_a_run_that_has_its_scheduled_time_and_leaves_the_schedule_alone(project: Path) -> None:
    before = document("cron", "ls", cwd=project)["schedules"]
    run = document("cron", "fire", "daily-report", cwd=project)["run"]
    assert (run["workflow"], run["group"], run["payload"]) == ("daily-report", "reports", None)
    done("dev", "--once", cwd=project)
    ended = run_of(project, run["id"])
    assert instant(ended["result"]) == instant(ended["scheduled_at"]) <= instant(ended["created_at"])
    assert [(one["next"], one["last_run"]) for one in document("cron", "ls", cwd=project)["schedules"]] == [
        (one["next"], None) for one in before
    ]
    told = tako("cron", "fire", "daily-report", cwd=project)
    assert told.stdout.split()[1:] == ["daily-report", "fired"]
    assert "tako dev" in told.stderr


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("sprng", "no workflow 'sprng'", "Did you mean spring?"),
        ("plain", "workflow 'plain' has no schedule", "Start a run of it: tako runs start plain"),
    ],
)
def test_fire_refuses_what_is_no_schedule_and_starts_nothing(project: Path, name: str, message: str, hint: str) -> None:
    answer = document("cron", "fire", name, cwd=project, code=4)
    assert (answer["error"]["message"], answer["error"]["hint"]) == (message, hint)
    assert document("runs", "ls", cwd=project) == {"runs": []}


# --- the values ------------------------------------------------------------------------------------------------------

NOON = clock.instant(datetime(2026, 10, 24, 12, tzinfo=UTC))


def daily(next_at: int, last_at: int | None = None) -> ScheduleRecord:
    return ScheduleRecord("w", "default", "30 2 * * *", "Europe/Berlin", "latest", "allow", next_at, last_at)


def test_a_time_that_should_have_fired_and_has_not_is_overdue() -> None:
    night = clock.instant(datetime(2026, 10, 25, 0, 30, tzinfo=UTC))
    one = timetable.standing(daily(next_at=night), {}, NOON)
    assert (one["overdue"], one["next"]["at"]) == (None, "2026-10-25T00:30:00.000000Z")
    assert one["next"]["local"] == "2026-10-25T02:30:00+02:00"
    assert one["next"]["note"] == "clocks go back: 02:30 comes twice, fires the first time only"
    late = timetable.standing(daily(next_at=night), {}, night + cron.LATE)
    assert late["overdue"] == {"at": one["next"]["at"], "local": one["next"]["local"]}
    assert late["next"]["local"] == "2026-10-26T02:30:00+01:00"
    assert timetable.standing(daily(next_at=night), {}, night + cron.LATE - 1)["overdue"] is None


def test_a_clock_that_was_set_back_a_little_shows_nothing_that_has_fired_already() -> None:
    fired = clock.instant(datetime(2026, 10, 24, 0, 30, tzinfo=UTC))
    stored = daily(fired + clock.DAY, last_at=fired)
    [first] = timetable.upcoming(stored, fired - clock.SECOND, 1)
    assert first["at"] == clock.iso(fired + clock.DAY)
    [first] = timetable.upcoming(stored, fired - cron.CORRECTION - 1, 1)
    assert first["at"] == clock.iso(fired), "it was wrong before: see cron.due"
