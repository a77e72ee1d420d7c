"""`tako dev` as a person at a terminal meets it: a log, a footer, keys; and the terminal left as it was found."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cli import TAKO, document, done, environment, is_alive, make_project, run_of, start
from conftest import until
from terminal import Terminal, at_terminal

from tako_runtime.store import open_store, project_home
from tako_runtime.store.base import ListWorkers

# They run processes of their own.
pytestmark = pytest.mark.slow

ORDERS = """
    from dataclasses import dataclass
    import subprocess
    import sys

    from tako_runtime import Backoff, Step, workflow

    @dataclass
    class Order:
        id: int
        total: float = 9.5

    @workflow("order")
    async def order(payload: Order, step: Step) -> int:
        '''Take an order.'''
        await step.run("charge", charge, payload.total)
        await step.wait_for(f"approval:{payload.id}", timeout="7d")
        await step.sleep("2h")
        return payload.id

    def charge(total: float) -> None:
        print(f"charged {total}")

    @workflow("fail", retries=0)
    async def fail(payload: dict, step: Step) -> None:
        await step.run("break", breaks)

    def breaks() -> None:
        raise ValueError("no such card")

    @workflow("hold", retries=0)
    async def hold(payload: None, step: Step) -> None:
        await step.run("held", subprocess.run, ["sleep", "600"])

    @workflow("report", schedule="0 9 * * *")
    async def report(payload: None, step: Step) -> None:
        await step.run("mail", print, "mailed")
"""

CONFIG = 'name = "shop"\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", ORDERS, CONFIG)


def workers_of(project: Path) -> list[int]:
    opened = open_store(project_home("shop", project))
    try:
        return [worker.pid for worker in opened.do_sync(ListWorkers())]
    finally:
        opened.close()


def status(project: Path) -> dict[str, object]:
    return dict(document("status", cwd=project)["status"])


def in_raw_mode(dev: Terminal) -> bool:
    return not dev.program.getecho()


# --- a day at it -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_start_signal_break_mend_and_quit_leave_no_child_and_no_port(columns: int, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"]
    app = f"[app]\ncommand = {json.dumps(command)}\nport = {port}\n"
    project = make_project(tmp_path / "shop", ORDERS, CONFIG + app)
    with at_terminal("dev", cwd=project, columns=columns) as dev:
        dev.wait_for(f"tako dev  shop  http://127.0.0.1:{port}")
        dev.wait_for_foot(r"0 queued  0 running  0 parked")
        until(lambda: is_taken(port))
        dev.press("s")
        dev.wait_for("start which workflow")
        dev.wait_for("order .*Take an order")
        dev.press("3")
        dev.wait_for(r"payload of order")
        dev.wait_for(r'\{"id":1,"total":9.5\}')
        dev.press("\r")
        dev.wait_for("charged 9.5")
        dev.wait_for(r"approval:1")
        dev.wait_for_foot("1 parked")
        dev.press("w")
        dev.wait_for("send which signal")
        dev.press("\r")
        dev.wait_for("payload of signal approval:1")
        dev.press("\x15true\r")
        dev.wait_for("sleeps")
        dev.wait_for_foot("wakes in 119m")
        flows = project / "workflows" / "flows.py"
        good = flows.read_text()
        flows.write_text(good.replace("return payload.id", "return payload.("))
        dev.wait_for(r"SyntaxError")
        dev.press("n")
        dev.wait_for("succeeded")
        dev.wait_for_foot("0 parked")
        flows.write_text(good.replace("charged {total}", "charged {total} EUR"))
        dev.wait_for("the new code is at work")
        dev.wait_for_foot("reloaded" if columns > 60 else "0 parked")
        dev.press("s3")
        dev.wait_for("as the last time")
        dev.press("\r")
        dev.wait_for(r"charged 9\.5\s+EUR")
        dev.wait_for_foot("1 parked")
        workers = workers_of(project)
        assert workers
        assert all(len(row) <= columns for row in dev.lines)
        assert len(dev.rows) > 10
        before = list(dev.lines)
        dev.press("q")
        assert dev.ended() == 0
        assert "? for keys" not in "\n".join(dev.lines)
        assert "stopped" in dev.lines[-1]
        assert dev.lines[: len(before) - 1] == before[:-1]
    assert not any(map(is_alive, workers))
    assert not is_taken(port)
    waiting, ended = document("runs", "ls", cwd=project)["runs"]
    assert (waiting["reason"], ended["status"]) == ("waiting", "succeeded")
    assert waiting["payload"] == ended["payload"] == {"id": 1, "total": 9.5}


def test_each_key_does_what_the_help_says(project: Path) -> None:
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        dev.press("?")
        for key in "srnwlfp?q":
            dev.wait_for(rf"^  {re.escape(key)}  \w")
        dev.press("l")
        dev.wait_for("no runs yet: press s")
        dev.press("n")
        dev.wait_for("no run sleeps. A sleep of less than 30 s")
        dev.press("w")
        dev.wait_for("no run waits for a signal")
        dev.press("f")
        dev.wait_for("fire which schedule")
        dev.press("\r")
        dev.wait_for("mail │ mailed")
        dev.wait_for("report +succeeded")
        dev.press("l")
        dev.wait_for(r"^[0-9a-f]{8}  report +succeeded +1/3")
        dev.press("\x03")
        assert dev.ended() == 0
    [run] = document("runs", "ls", cwd=project)["runs"]
    assert run["scheduled_at"] is not None


def test_the_next_payload_begins_with_the_last_one_and_the_first_with_the_projects_own_example(project: Path) -> None:
    (project / "order.json").write_text('{\n  "id": 7\n}\n')
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for(r"or: tako runs start .*")
        dev.wait_for_foot("for keys")
        dev.press("s3")
        dev.wait_for("payload of order, from order.json")
        dev.wait_for(r'^   \{"id": 7\}')
        dev.press("\x1b[D8\r")  # one to the left
        dev.wait_for('started with {"id": 78}')
        dev.press("s3")
        dev.wait_for("payload of order, as the last time")
        dev.wait_for(r'^   \{"id": 78\}')
        dev.press("\x1b")
        dev.wait_for("payload of order", gone=True)
        dev.press("q")
        assert dev.ended() == 0


def test_what_is_no_json_is_said_and_stays_to_be_mended(project: Path) -> None:
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        dev.press("s3\x15")
        dev.press('{"id": 5\r')
        dev.wait_for("that is no JSON")
        dev.press("}\r")
        dev.wait_for('started with {"id": 5}')
        dev.press("q")
        assert dev.ended() == 0


def test_a_question_takes_no_line_from_the_log(project: Path) -> None:
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        dev.press("s3")
        dev.wait_for("payload of order")
        run = start(project, "fail", {})
        dev.wait_for(f"{run[-8:]} fail +dead")
        assert re.match(" payload of order", dev.rows[-3])
        assert re.match(r'   \{"id":1', dev.rows[-2])
        assert "queued" in dev.rows[-1]
        dev.press("\x1b")
        dev.wait_for("payload of order", gone=True)
        about = [line for line in dev.lines if run[-8:] in line]
        assert [re.sub(r".* fail +", "", line)[:12] for line in about] == [
            "attempt 1 of", "step break f", "dead: ValueE",
        ]  # fmt: skip
        dev.press("q")
        assert dev.ended() == 0


def test_a_pause_holds_claims_up_is_told_of_and_ends_with_this_dev(project: Path) -> None:
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        dev.press("p")
        dev.wait_for_foot("^ paused ")
        assert str(status(project)["paused"]).startswith(f"tako dev, process {dev.program.pid} on ")
        run = start(project, "report", None)
        assert "has paused the app" in done("runs", "why", run, cwd=project)
        dev.wait_for_foot("paused  1 queued")
        assert "paused" in done("status", cwd=project)
        assert run_of(project, run)["status"] == "pending"
        dev.press("p")
        dev.wait_for("report +succeeded")
        dev.press("p")
        dev.wait_for_foot("^ paused ")
        dev.press("q")
        assert dev.ended() == 0
    assert status(project)["paused"] is None


def test_a_pause_lapses_when_its_dev_is_killed(project: Path) -> None:
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        dev.press("p")
        dev.wait_for_foot("^ paused ")
        os.kill(dev.program.pid, signal.SIGKILL)
        dev.ended()
    until(lambda: status(project)["paused"] is None)


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_a_footer_survives_a_resize_and_garbles_no_line(project: Path) -> None:
    with at_terminal("dev", cwd=project, columns=100) as dev:
        dev.wait_for_foot("for keys")
        for columns in (60, 140, 80):
            dev.resize(columns)
            run = start(project, "report", None)
            dev.wait_for(f"{run[-8:]} report +succeeded")
            dev.wait_for_foot("0 queued  0 running  0 parked  . for keys")
        assert sum("for keys" in line for line in dev.lines) == 1
        assert all(re.match(r"\d\d:\d\d:\d\d|  |tako dev|$| 0 queued", line) for line in dev.lines), dev.lines
        dev.press("q")
        assert dev.ended() == 0


def test_a_question_is_drawn_anew_for_the_width_that_there_is(project: Path) -> None:
    with at_terminal("dev", cwd=project, columns=100) as dev:
        dev.wait_for_foot("for keys")
        dev.press("s3")
        dev.wait_for("payload of order")
        dev.press("\x15" + "9" * 90)
        dev.wait_for("9{90}")
        dev.resize(60)
        dev.wait_for("^   9{56}\n   9{34}$")
        dev.press("\r")
        dev.wait_for("PayloadRefused")
        dev.press("q")
        assert dev.ended() == 0


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(project: Path) -> None:
    shell = Terminal(["bash", "--norc", "-i"], project, 100, PS1="$ ")
    try:
        shell.press(f"{sys.executable} -m tako_cli dev\n")
        shell.wait_for_foot("for keys")
        assert in_raw_mode(shell)
        shell.press("\x1a")
        shell.wait_for("Stopped")
        shell.wait_for("for keys", gone=True)
        shell.press("stty -a\n")
        assert shell.wait_for(r"(?<!-)icanon")
        assert shell.wait_for(r"(?<!-)echo\b")
        shell.press("fg\n")
        shell.wait_for_foot("for keys")
        shell.press("?")
        shell.wait_for("^  s  start a workflow")
        shell.press("q")
        shell.wait_for("stopped")
        shell.press("stty -a | grep -c ' -icanon'\n")
        shell.wait_for(r"^0$")
    finally:
        shell.program.close(force=True)


def test_a_worker_that_is_killed_harms_neither_the_footer_nor_the_terminal(project: Path) -> None:
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        run = start(project, "hold", None)
        dev.wait_for(f"{run[-8:]} hold +attempt 1")
        dev.wait_for_foot("1 running")
        [worker] = workers_of(project)
        os.killpg(worker, signal.SIGKILL)
        dev.wait_for("worker process .* is gone")
        dev.wait_for("hold +dead: worker died|worker died during attempt 1")
        dev.wait_for_foot("0 running")
        assert in_raw_mode(dev)
        dev.press("q")
        assert dev.ended() == 0


def test_a_terminal_that_is_closed_ends_it_with_all_its_children(project: Path) -> None:
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        run = start(project, "report", None)
        dev.wait_for(f"{run[-8:]} report +succeeded")
        workers = workers_of(project)
        assert workers
        dev.program.ptyproc.fileobj.close()  # what a window does that is closed
        until(lambda: not any(map(is_alive, [*workers, dev.program.pid])))


def test_in_the_background_it_takes_no_key_and_draws_no_footer_until_it_is_in_front(project: Path) -> None:
    shell = Terminal(["bash", "--norc", "-i"], project, 100, PS1="$ ")
    try:
        shell.press(f"{sys.executable} -m tako_cli dev &\n")
        shell.wait_for("group default started")
        shell.press("echo typed-$((1 + 1))\n")
        shell.wait_for("^typed-2")
        assert "for keys" not in "\n".join(shell.lines)
        shell.press("fg\n")
        shell.wait_for_foot("for keys")
        shell.press("q")
        shell.wait_for("stopped")
    finally:
        shell.program.close(force=True)


SCREEN = """
    import asyncio, sys
    from tako_cli import output
    from tako_cli.dev.screen import Screen

    async def main():
        screen = Screen()
        with screen:
            screen.show([output.styled(" the foot")])
            output.show(output.styled("a line"))
            {then}

    asyncio.run(main())
"""


def screen_script(project: Path, then: str) -> Terminal:
    code = textwrap.dedent(SCREEN).format(then=textwrap.indent(textwrap.dedent(then), " " * 8).strip())
    return Terminal([sys.executable, "-c", code], project, 100)


def test_a_crash_leaves_the_terminal_as_it_was_and_its_traceback_whole(project: Path) -> None:
    terminal = screen_script(project, "await screen.key(); raise ValueError('a defect')")
    terminal.wait_for_foot("the foot")
    assert in_raw_mode(terminal)
    terminal.press("x")
    assert terminal.ended() == 1
    assert "the foot" not in "\n".join(terminal.lines)
    assert terminal.lines[0] == "a line"
    assert terminal.lines[-1] == "ValueError: a defect"


def test_while_it_is_lent_the_terminal_is_as_it_was_and_no_key_is_taken(project: Path) -> None:
    terminal = screen_script(
        project,
        """
        await screen.key()
        with screen.lent():
            said = await asyncio.to_thread(input, "(Pdb) ")
            output.show(output.styled(f"heard {said}"))
        output.show(output.styled(f"then {await screen.key()}"))
        """,
    )
    terminal.wait_for_foot("the foot")
    terminal.press("x")
    terminal.wait_for_foot(r"\(Pdb\)")
    assert "the foot" not in "\n".join(terminal.lines)
    assert not in_raw_mode(terminal)
    terminal.press("continue\n")
    terminal.wait_for("^heard continue")
    terminal.wait_for_foot("the foot")
    terminal.press("y")
    assert terminal.ended() == 0
    assert terminal.lines[-1] == "then y"


@pytest.mark.parametrize("place", ["    breakpoint()\n{line}", "{line}\n    breakpoint()"], ids=["first", "last"])
def test_a_breakpoint_has_the_terminal_and_then_the_footer_and_the_keys_are_back(project: Path, place: str) -> None:
    flows = project / "workflows" / "flows.py"
    line = '    print(f"charged {total}")'
    flows.write_text(flows.read_text().replace(line, place.format(line=line)))
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        dev.press("s3")
        dev.wait_for("payload of order")
        dev.press("\r")
        dev.wait_for_foot(r"\(Pdb\)")
        assert not in_raw_mode(dev)
        assert sum("for keys" in line for line in dev.lines) == 0
        assert sum("0 running" in line or "1 running" in line for line in dev.lines) == 0
        dev.press("p total * 2\n")
        dev.wait_for("^19.0")
        dev.press("c\n")
        dev.wait_for("charged 9.5")
        dev.wait_for_foot("1 parked")
        assert in_raw_mode(dev)
        dev.press("q")
        assert dev.ended() == 0


def test_a_group_that_cannot_work_is_in_the_footer_in_red_until_it_can(project: Path) -> None:
    flows = project / "workflows" / "flows.py"
    good = flows.read_text()
    flows.write_text(f"import sys\nif 'worker' in sys.argv:\n    sys.exit('no database')\n{good}")
    with at_terminal("dev", cwd=project) as dev:
        dev.wait_for_foot("for keys")
        dev.wait_for("^ group default cannot work: .*no database")
        row = len(dev.rows) - 2
        assert dev.rows[row].startswith(" group default cannot work")
        assert dev.screen.buffer[row][1].fg == "red"
        flows.write_text(good)
        dev.wait_for("^ group default cannot work", gone=True)
        dev.press("q")
        assert dev.ended() == 0


# --- no terminal, no colour ------------------------------------------------------------------------------------------


def test_no_color_is_heeded(project: Path) -> None:
    with at_terminal("dev", cwd=project, NO_COLOR="1") as dev:
        dev.wait_for_foot("for keys")
        run = start(project, "fail", {})
        dev.wait_for(f"{run[-8:]} fail +dead")
        dev.press("q")
        assert dev.ended() == 0
    assert not re.search(rb"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|38|4[0-7])\b[0-9;]*m", dev.raw)


def test_plain_has_no_colour_no_footer_and_no_keys(project: Path) -> None:
    with at_terminal("dev", "--plain", cwd=project, columns=60) as dev:
        dev.wait_for("start +tako runs start")
        run = start(project, "fail", {})
        dev.wait_for(f"{run[-8:]} fail")
        dev.wait_for("no such card")
        assert not in_raw_mode(dev)
        dev.press("\x03")
        assert dev.ended() == 0
    assert b"\x1b" not in dev.raw
    assert b"keys" not in dev.raw


def test_where_there_is_no_terminal_lines_are_plain_and_end_with_the_stop(project: Path) -> None:
    process = subprocess.Popen(
        [*TAKO, "dev"], cwd=project, env=environment(TERM="xterm-256color"), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    run = start(project, "fail", {})
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f"{run[-8:]} fail " in line and "dead" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "\x1b" not in "".join(lines)
    assert lines[-1].endswith("stopped\n")
    process.stdout.close()
