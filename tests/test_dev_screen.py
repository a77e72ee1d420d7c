"""What `tako dev` makes of keys, of events and of the store, before any terminal sees it."""

import asyncio
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Caller
from rich.text import Text

from tako_cli import output, wording
from tako_cli.dev.board import Board
from tako_cli.dev.footer import Footer
from tako_cli.dev.keys import Keys
from tako_cli.dev.lines import Lines
from tako_cli.dev.questions import Choice, Line
from tako_cli.dev.welcome import Found, payload_file, welcome
from tako_cli.timeline import short_id
from tako_runtime import clock
from tako_runtime.clock import HOUR, MINUTE
from tako_runtime.control import Control
from tako_runtime.errors import NotFound, Refused
from tako_runtime.manifest import Declared
from tako_runtime.run import new_id
from tako_runtime.state import Returned, Sleeps
from tako_runtime.store import base
from tako_runtime.store.commit import StoreThread

# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "keys"),
    [
        ([b"as\r"], ["a", "s", "<enter>"]),
        ([b"\x1b[A\x1bOB\x1b[3~"], ["<up>", "<down>", "<delete>"]),
        ([b"\x1b", b"[", b"D"], ["<left>"]),
        ([b"\xc3", b"\xa9"], ["é"]),
        ([b"\x1b[15~\x1b[1;5Cx"], ["x"]),
        ([b"\x1bx\x00"], []),
        ([b"\x1b[200~{\r\n  1", b"}\x1b[201~\r"], ["{ 1}", "<enter>"]),
        ([b"\x7f\x08\x15\x17"], ["<backspace>", "<backspace>", "<clear>", "<word>"]),
    ],
)
def test_what_a_terminal_sends_becomes_keys_in_however_many_pieces_it_comes(
    pieces: list[bytes], keys: list[str]
) -> None:
    reader = Keys()
    assert [key for piece in pieces for key in reader.feed(piece)] == keys
    assert not reader.unfinished


def test_escape_alone_is_a_key_once_nothing_has_followed_it() -> None:
    reader = Keys()
    assert reader.feed(b"\x1b") == []
    assert reader.unfinished
    assert reader.flush() == ["<esc>"]
    assert reader.flush() == []


# --- questions -------------------------------------------------------------------------------------------------------


def typed(line: Line, *keys: str) -> str | None:
    for key in keys:
        if line.press(key):
            return line.answer
    pytest.fail("it is not answered")


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        ([], "abc"),
        (["d"], "abcd"),
        (["<left>", "<left>", "x"], "axbc"),
        (["<home>", "x", "<end>", "y"], "xabcy"),
        (["<backspace>", "<home>", "<delete>"], "b"),
        (["<left>", "<clear>"], "c"),
        (["<home>", "<right>", "<cut>"], "a"),
        ([" ", "d", "e", "<word>", "f"], "abc f"),
        (['{"a": 1}'], 'abc{"a": 1}'),
        (["<"], "abc<"),
        (["<home>", "<left>", "<backspace>", "<end>", "<right>", "<delete>"], "abc"),
    ],
)
def test_a_line_is_edited_as_everywhere(keys: list[str], answer: str) -> None:
    assert typed(Line("payload", "abc", lambda _: ""), *keys, "<enter>") == answer


def test_a_line_that_cannot_be_taken_stays_with_the_reason_and_escape_gives_it_up() -> None:
    line = Line("payload", "{", lambda text: "no JSON" if text == "{" else "")
    assert not line.press("<enter>")
    assert "no JSON" in line.rows(80)[-1].plain
    assert typed(line, "}", "<enter>") == "{}"
    other = Line("payload", "{", lambda _: "")
    assert other.press("<esc>")
    assert other.answer is None


def test_a_long_line_takes_several_rows_and_the_cursor_is_always_among_them() -> None:
    line = Line("payload", "x" * 2_000, lambda _: "")
    rows = line.rows(60)
    assert len(rows) <= 9
    assert all(row.cell_len < 60 for row in rows[1:])
    assert any(span.style == "reverse" for span in rows[-1].spans)
    line.press("<home>")
    assert any(span.style == "reverse" for span in line.rows(60)[1].spans)


def test_one_of_several_is_chosen_by_arrows_or_by_its_number() -> None:
    def asked(*keys: str) -> Any:
        choice = Choice("which?", [(f"n{i}", "beside", i) for i in range(20)])
        return [choice.press(key) for key in keys][-1] and choice.answer

    assert asked("<enter>") == 0
    assert asked("<down>", "<down>", "<up>", "<enter>") == 1
    assert asked("<up>", "<enter>") == 19
    assert asked("3") == 2
    assert asked("0") is False
    assert asked("<esc>") is None


def test_of_many_choices_those_around_the_chosen_one_are_shown() -> None:
    choice = Choice("which?", [(f"n{i}", "", i) for i in range(20)])
    for _ in range(11):
        choice.press("<down>")
    rows = [row.plain for row in choice.rows(80)]
    assert len(rows) <= 9
    assert re.search(r"^ >\s+n11", rows[-1])
    assert "(12 of 20)" in rows[0]


# --- the log ---------------------------------------------------------------------------------------------------------

RUN = "0199a3b2-1c4d-7000-8000-0000deadbeef"
FACTS = {"at": "2026-01-02T03:04:05.678901Z", "level": "info", "run": RUN, "workflow": "order", "group": "default"}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    lines: list[Text] = []
    monkeypatch.setattr(output, "show", lambda *parts: lines.extend(parts))
    monkeypatch.setattr(output, "width", lambda: 200)
    return lines


def lines_of(root: Path, **options: Any) -> Lines:
    return Lines(root, ["app", "default", "media"], ["order"], as_json=False, lost=lambda: None, **options)


def test_the_columns_are_time_source_run_workflow_and_message(shown: list[Text], tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    lines.show("default", {**FACTS, "event": "run.started", "message": "attempt 1 of 3 started"})
    lines.show("media", {**FACTS, "event": "step.done", "message": "step cut done in 3ms", "level": "debug"})
    first, second = (line.plain for line in shown)
    time = wording.with_local_times(FACTS["at"], wording.now(), distances=False)[-8:]
    assert first == f"{time}.678 worker deadbeef order  attempt 1 of 3 started"
    assert second == f"{time}.678 media  deadbeef order  step cut done in 3ms"


def test_each_source_has_a_colour_of_its_own_that_stays(shown: list[Text], tmp_path: Path) -> None:
    def colours() -> dict[str, str]:
        shown.clear()
        lines = lines_of(tmp_path)
        for source in ("app", "default", "media", "tako"):
            lines.show(source, {**FACTS, "event": "output", "message": "x"})
        lines.of_supervisor({**FACTS, "at": clock.DAY, "level": 20, "event": "cron.fired", "scheduled_at": "now"})
        return {line.plain.split()[1]: str(line.spans[1].style) for line in shown}

    found = colours()
    assert set(found) == {"app", "worker", "media", "tako", "cron"}
    assert len(set(found.values())) == 5
    assert colours() == found


def test_what_is_printed_in_a_step_stands_beside_its_name(shown: list[Text], tmp_path: Path) -> None:
    lines_of(tmp_path).show("default", {**FACTS, "event": "output", "step": "charge", "message": "paid"})
    assert shown[0].plain.endswith("deadbeef order  charge │ paid")


TRACEBACK = """Traceback (most recent call last):
  File "{root}/workflows/flows.py", line 3, in order
    pay()
  File "{root}/.venv/lib/python3.11/site-packages/stripe/api.py", line 9, in pay
    raise Oops
    ^^^^^^^^^^
  File "/usr/lib/python3.11/json/__init__.py", line 1, in loads
    x
ValueError: no such card
"""


def test_an_error_shows_the_frames_of_the_project_and_with_verbose_all(shown: list[Text], tmp_path: Path) -> None:
    event = {**FACTS, "event": "run.dead", "message": "dead", "error": TRACEBACK.format(root=tmp_path)}
    lines_of(tmp_path).show("default", event)
    assert [line.plain.strip() for line in shown[1:]] == [
        'File "workflows/flows.py", line 3, in order', "pay()", "ValueError: no such card",
    ]  # fmt: skip
    shown.clear()
    lines_of(tmp_path, verbose=True).show("default", event)
    assert "site-packages" in "".join(line.plain for line in shown)
    assert shown[1].plain.strip() == "Traceback (most recent call last):"


def test_what_was_raised_is_said_once(shown: list[Text], tmp_path: Path) -> None:
    message = "attempt 1 of 3 failed, again in 1s: ValueError: no such card"
    event = {**FACTS, "event": "run.retrying", "message": message, "traceback": TRACEBACK.format(root=tmp_path)}
    lines_of(tmp_path).show("default", event)
    assert "".join(line.plain for line in shown).count("ValueError: no such card") == 1
    assert shown[-1].plain.strip() == "pay()"


def test_new_code_and_what_was_done_before_go_without_saying_but_for_verbose(shown: list[Text], tmp_path: Path) -> None:
    def said(verbose: bool) -> list[str]:
        shown.clear()
        lines = lines_of(tmp_path, verbose=verbose)
        started = {**FACTS, "event": "worker.started", "message": "up"}
        reloaded = {"at": clock.DAY, "level": 20, "event": "code.reloaded", "files": 1, "ms": 3.0}
        lines.show("default", started)
        lines.of_supervisor(reloaded)
        lines.show("default", started)
        lines.show("default", {**FACTS, "event": "worker.stopped", "reason": "drained", "message": "stopped"})
        lines.show("default", {**FACTS, "event": "step.cached", "message": "done already"})
        lines.show("default", {**FACTS, "event": "worker.stopped", "reason": "idle", "message": "idle"})
        lines.show("default", started)
        return [line.plain.split()[-1] for line in shown]

    assert said(verbose=False) == ["up", "3ms", "idle", "up"]
    assert said(verbose=True) == ["up", "3ms", "up", "stopped", "already", "idle", "up"]


def test_an_error_in_libraries_only_shows_their_frames(tmp_path: Path) -> None:
    only = 'Traceback (most recent call last):\n  File "/usr/lib/x.py", line 1, in f\n    x\nOops: y'
    assert wording.frames(only, tmp_path) == ['  File "/usr/lib/x.py", line 1, in f', "    x", "Oops: y"]


# --- ids -------------------------------------------------------------------------------------------------------------


def test_runs_of_one_millisecond_have_short_ids_of_their_own_that_every_command_takes(
    caller: Caller, opened: StoreThread
) -> None:
    runs = [caller.new(id=new_id(caller.now)) for _ in range(500)]
    caller.do(base.Enqueue(runs=runs, now=caller.now))
    assert len({run.id[:13] for run in runs}) == 1
    control = Control(opened, caller.clock)
    assert len({short_id(run.id) for run in runs}) == 500
    assert [control.find(short_id(run.id)).id for run in runs] == [run.id for run in runs]


def test_an_end_that_is_too_short_to_be_meant_names_no_run(caller: Caller, opened: StoreThread) -> None:
    caller.enqueue(id="0199a3b2-1c4d-7000-8000-0000deadbeef")
    control = Control(opened, caller.clock)
    assert control.find("deadbeef").id.endswith("deadbeef")
    with pytest.raises(NotFound):
        control.find("beef")
    caller.enqueue(id="0199a3b3-1c4d-7000-8000-0000deadbeef")
    with pytest.raises(Refused, match="the end of several ids"):
        control.find("deadbeef")


# --- n ---------------------------------------------------------------------------------------------------------------


def test_the_run_that_would_wake_first_is_woken_and_without_one_it_is_said(caller: Caller, opened: StoreThread) -> None:
    control = Control(opened, caller.clock)
    with pytest.raises(NotFound, match="no run sleeps"):
        control.wake()
    runs = [caller.started() for _ in range(2)]
    for run, length in zip(runs, (2 * HOUR, HOUR), strict=True):
        caller.settle(run, Sleeps(caller.now + length))
    assert control.wake()["id"] == runs[1].id
    assert caller.get(runs[1]).due_at == caller.now
    assert caller.get(runs[0]).reason == "sleeping"
    assert control.wake(runs[0].id)["reason"] == "queued"
    with pytest.raises(Refused, match="does not sleep"):
        control.wake(runs[0].id)


# --- the footer ------------------------------------------------------------------------------------------------------


class Watched:
    """A footer on a store whose operations are written down."""

    def __init__(self, opened: StoreThread, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.rows: list[Text] = []
        do = opened.do

        def noted(op: Any) -> Any:
            self.asked.append(type(op).__name__)
            return do(op)

        monkeypatch.setattr(opened, "do", noted)
        monkeypatch.setattr(output, "width", lambda: self.width)
        self.width = 120
        self.footer = Footer(lambda: [opened], lambda rows: setattr(self, "rows", list(rows)))

    def look(self) -> list[str]:
        """What one look asks the store for."""
        self.asked.clear()
        asyncio.run(self.footer._look())
        self.footer.draw()
        return list(self.asked)

    @property
    def line(self) -> str:
        return self.rows[-1].plain


@pytest.fixture
def watched(opened: StoreThread, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(opened, monkeypatch)


def test_a_footer_counts_what_waits_runs_and_is_parked_and_says_when_the_next_wakes(
    caller: Caller, watched: Watched
) -> None:
    caller.clock._now = wording.now()
    for _ in range(3):
        caller.enqueue()
    caller.settle(caller.claim()[0].run, Sleeps(caller.now + 90 * MINUTE))
    caller.claim()
    watched.look()
    assert watched.line.startswith(" 1 queued  1 running  1 parked  wakes in 89m")


def test_at_rest_one_look_asks_for_one_number_and_only_news_make_it_count_again(
    caller: Caller, watched: Watched
) -> None:
    assert "CountRuns" in watched.look()
    assert watched.look() == ["DataVersion"]
    assert watched.look() == ["DataVersion"]
    watched.footer.heard({"event": "run.started"})
    assert "CountRuns" in watched.look()
    assert watched.look() == ["DataVersion"]


def test_a_footer_looks_once_a_second_whatever_is_going_on(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        watched.footer.heard({"event": "run.started"})
        if len(pauses) == 5:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", pause)
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(watched.footer.run())
    assert pauses == [1.0] * 5
    assert watched.asked.count("CountRuns") == 5


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_footer_has_what_there_is_room_for(caller: Caller, watched: Watched, width: int) -> None:
    watched.width = width
    caller.settle(caller.started(), Sleeps(max(caller.now, wording.now()) + 500 * clock.DAY))
    watched.footer.heard({"event": "code.reloaded"})
    watched.look()
    assert len(watched.line) < width
    assert "1 parked" in watched.line
    assert [word for word in ("wakes in", "reloaded", "keys") if word in watched.line] == {
        40: [], 60: ["wakes in", "keys"],
    }.get(width, ["wakes in", "reloaded", "keys"])  # fmt: skip


def test_a_group_that_cannot_work_is_in_red_until_it_is_well(watched: Watched) -> None:
    sick = {"event": "group.unhealthy", "group": "media", "reason": "no ffmpeg"}
    watched.footer.heard(sick)
    watched.footer.draw()
    assert watched.rows[0].plain == " group media cannot work: no ffmpeg"
    assert "red" in [str(span.style) for span in watched.rows[0].spans]
    watched.footer.heard({"event": "group.healthy", "group": "media"})
    watched.footer.draw()
    assert len(watched.rows) == 1


# --- the first lines -------------------------------------------------------------------------------------------------


def declared(name: str, **fields: Any) -> Declared:
    told: dict[str, Any] = {"group": "default", "retries": 2, "backoff_base": 1, "backoff_max": 1, "payload": "Order"}
    return Declared(name=name, file="flows.py", line=1, **told | fields)


def found(root: Path, *flows: Declared, **fields: Any) -> Found:
    told: dict[str, Any] = {
        "app": "shop", "url": "http://127.0.0.1:8000", "root": root, "folder": "workflows", "workflows": flows,
        "store": root / ".tako/apps/shop/runs.db", "secrets": ["STRIPE_KEY"], "missing": ["MAIL_KEY"],
        "left": {"sleeping": 1, "waiting": 2}, "keys": True,
    }  # fmt: skip
    return Found(**told | fields)


@pytest.mark.parametrize("width", [60, 200])
def test_at_most_ten_lines_say_what_there_is(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "width", lambda: width)
    flows = [
        declared("report", schedule="0 9 * * *", payload=None), declared("video", group="media"),
        *(declared(f"more-{n}") for n in range(8)),
    ]  # fmt: skip
    (tmp_path / "order.json").write_text("{}")
    lines = [line.plain for line in welcome(found(tmp_path, *flows))]
    assert len(lines) <= 10
    assert all(len(line) <= width for line in lines)
    said = " ".join(" ".join(lines).split())
    for words in (
        "shop http://127.0.0.1:8000", "report 0 9 * * * UTC", "video group media", "and 7 more: tako workflows ls",
        "store .tako/apps/shop/runs.db", "secrets STRIPE_KEY; missing: MAIL_KEY",
        "3 runs resume; --fresh to start empty",
        "tako runs start video --payload @order.json",
    ):  # fmt: skip
        assert words in said


def test_with_nothing_there_the_first_lines_are_few(tmp_path: Path) -> None:
    lines = [line.plain for line in welcome(found(tmp_path, secrets=[], missing=[], left={}, url=None))]
    assert lines == [
        "tako dev  shop", "  no workflow is declared in workflows/ yet", "  store   .tako/apps/shop/runs.db",
    ]  # fmt: skip


def test_a_projects_own_example_has_the_name_of_the_payloads_type(tmp_path: Path) -> None:
    (tmp_path / "big_order.json").write_text("{}")
    assert payload_file(declared("x", payload="BigOrder"), tmp_path) == tmp_path / "big_order.json"
    assert payload_file(declared("x", payload="Order"), tmp_path) is None
    assert payload_file(declared("x", payload=None), tmp_path) is None
    assert payload_file(declared("x", payload="dict[str, int]"), tmp_path) is None


# --- s: where a payload begins ---------------------------------------------------------------------------------------


def test_a_payload_begins_with_the_last_one_of_this_store_then_the_projects_example_then_its_types(
    caller: Caller, opened: StoreThread, tmp_path: Path
) -> None:
    board = Board.__new__(Board)
    board._control = Control(opened, caller.clock)
    board._config = type("Config", (), {"root": tmp_path})()  # type: ignore[assignment]
    flow = declared("order", example='{"id":1}')
    assert board._last_payload(flow) == ('{"id":1}', ", a Order")
    (tmp_path / "order.json").write_text('{\n"id": 2}')
    assert board._last_payload(flow) == ('{"id": 2}', ", from order.json")
    (tmp_path / "order.json").write_text("no JSON")
    assert board._last_payload(flow)[0] == '{"id":1}'
    run = caller.started(payload=json.dumps({"id": 3}))
    caller.settle(run, Returned("1"))
    assert board._last_payload(flow) == ('{"id": 3}', ", as the last time")
