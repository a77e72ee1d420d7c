"""The log from the servers: what a line of a journal is, and the order of those of several."""

import json
from typing import Any

import pytest

from tako_cli import journal
from tako_cli.journal import Asked
from tako_runtime import clock, config

SECOND = clock.SECOND


def entry(message: object, at: int = 5 * SECOND, **more: Any) -> str:
    return json.dumps({"__REALTIME_TIMESTAMP": str(at), "__CURSOR": f"s={at}", "MESSAGE": message, **more})


def test_a_line_of_our_log_is_the_event_that_it_was() -> None:
    event = {"at": "2026-11-25T08:00:00.000000Z", "level": "info", "event": "run.started", "message": "attempt 1"}
    line = journal.read("web-1", entry(json.dumps({**event, "run": "0192", "source": "email"})))
    assert line is not None
    assert line.event == {**event, "run": "0192", "source": "email"}
    assert (line.at, line.cursor, line.server) == (5 * SECOND, f"s={5 * SECOND}", "web-1")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Started tako-shop@1.service", "Started tako-shop@1.service"),
        ('{"no": "event"}', '{"no": "event"}'),
        ("[1, 2]", "[1, 2]"),
        ([104, 105, 255], "hi\ufffd"),
        (None, ""),
    ],
)
def test_what_is_no_event_of_ours_is_shown_as_it_is_with_the_journals_time(message: object, shown: str) -> None:
    line = journal.read("web-1", entry(message, PRIORITY="3"))
    assert line is not None
    assert line.event == {
        "at": clock.iso(5 * SECOND), "level": "error", "event": "output", "message": shown, "source": "systemd",
    }  # fmt: skip


def test_what_is_no_entry_is_passed_over() -> None:
    assert journal.read("web-1", "-- Boot 7 --") is None
    assert journal.read("web-1", "{}") is None


class Spoken:
    """A server as far as its journal goes: what it prints, and the commands that asked for it."""

    def __init__(self, name: str, *entries: str) -> None:
        self.name, self.entries, self.asked = name, entries, list[list[str]]()

    def lines(self, words: list[str]) -> Any:
        self.asked.append(words)
        return iter(self.entries)


@pytest.fixture
def shop(tmp_path: Any) -> config.Config:
    (tmp_path / "tako.toml").write_text('name = "shop"\n')
    return config.load(tmp_path / "tako.toml")


def test_the_lines_of_several_servers_are_in_the_order_of_their_times(shop: config.Config) -> None:
    one = Spoken("web-1", *(entry("one", at * SECOND) for at in (1, 4, 5)))
    two = Spoken("web-2", *(entry("two", at * SECOND) for at in (2, 3, 6)))
    found = list(journal.history(shop, "production", [one, two], Asked(newest=10)))  # type: ignore[list-item]
    assert [line.at // SECOND for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line.server for line in found] == ["web-1", "web-2", "web-2", "web-1", "web-1", "web-2"]


def test_a_run_is_found_by_its_id_and_by_the_beginning_or_the_end_of_it(shop: config.Config) -> None:
    def said(run: str) -> str:
        return entry(json.dumps({"at": "2026-11-25T08:00:00Z", "event": "run.started", "message": "", "run": run}))

    one = Spoken("web-1", said("0192-aaaa"), said("0193-bbbb"), entry("Started"))
    for asked in ("0192-aaaa", "0192", "aaaa"):
        found = list(journal.history(shop, "production", [one], Asked(run=asked)))  # type: ignore[list-item]
        assert [line.event["run"] for line in found] == ["0192-aaaa"]


def test_the_journal_is_asked_for_no_more_than_is_wanted(shop: config.Config) -> None:
    def options(asked: Asked, **more: Any) -> list[str]:
        return journal.words(shop, "production", asked, **more)[4:]

    assert options(Asked(newest=100)) == ["tako-shop@*.service", "--lines=100"]
    assert options(Asked(since=90 * SECOND)) == ["tako-shop@*.service", "--since=@90.000000"]
    assert options(Asked(newest=100, run="0192")) == ["tako-shop@*.service"], "those of one run are picked here"
    assert options(Asked(newest=100), after="s=1", follow=True) == [
        "tako-shop@*.service", "--after-cursor=s=1", "--lines=all", "--follow",
    ]  # fmt: skip
    assert journal.words(shop, "staging", Asked())[4] == "tako-shop.staging@*.service"
