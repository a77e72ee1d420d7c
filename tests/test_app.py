"""The app's own process: its start, what it is given, its health, its end, and nothing of it left behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from cli import FLOWS, Dev, at_terminal, developing, document, done, make_project, plain, tako
from conftest import until
from serving import Serving, keep_secrets, serving
from workers import gone

from tako_runtime.store import Home, project_home

# They run processes of their own.
pytestmark = pytest.mark.slow

APP = Path(__file__).parent / "scenarios" / "app.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def configured(folder: Path, how: str, port: int, more: str = "") -> Path:
    """A project whose app listens on its `{fd}` or `{port}`."""
    command = json.dumps(["python", str(APP), f"--{how}", f"{{{how}}}", "{other}"])
    config = f'name = "shop"\n[app]\ncommand = {command}\nport = {port}\nhealth = "/healthz"\n{textwrap.dedent(more)}'
    return make_project(folder, FLOWS, config)


def asked(port: int, path: str = "/") -> dict[str, Any]:
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return dict(json.loads(answer.read()))


def died(port: int) -> None:
    """Have the app end in the middle of an answer."""
    with suppress(OSError):
        asked(port, "/die")


@contextmanager
def in_dev(project: Path, *words: str) -> Iterator[Dev]:
    """`tako dev`, stopped in order at the end; of its app nothing is left, whatever has failed."""
    with developing(project, *words) as dev:
        try:
            yield dev
            if dev.process.poll() is None:
                dev.send(signal.SIGINT)
                assert dev.ended() == 0
        finally:
            end_apps(dev.events)


@contextmanager
def on_server(home: Home, project: Path, *words: str, env: dict[str, str] | None = None) -> Iterator[Serving]:
    with serving(home, project, *words, env=env) as server:
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()
            end_apps(server.events)


def end_apps(events: list[dict[str, Any]]) -> None:
    for event in events:
        if event["event"] == "app.started" and not gone(event["pid"]):
            os.killpg(event["pid"], signal.SIGKILL)


def in_group(leader: int) -> list[int]:
    """The live processes of a group, as /proc has them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def activated(listening: socket.socket, home: Home, project: Path) -> tuple[list[str], dict[str, Any]]:
    """The command of a server to which a socket is passed on as systemd does it: as number 3, for that very process."""
    code = """
        import os, sys
        os.dup2(int(sys.argv[1]), 3)
        os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "tako_runtime", "serve"])
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(listening.fileno())]
    return words, {"cwd": project, "env": os.environ | home.environment(), "pass_fds": [listening.fileno()]}


# --- what it is given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fd", "port"])
def test_the_app_is_a_direct_child_in_a_group_of_its_own_with_its_variables_and_secrets(
    how: str, tmp_path: Path
) -> None:
    port = free_port()
    more = '[vars]\nCOLOUR = "red"\nSIZE = "big"\n[vars.development]\nCOLOUR = "blue"\n'
    project = configured(tmp_path / "shop", how, port, more)
    keep_secrets(project_home("shop", project), {"STRIPE_KEY": "sk_live_51Hx"})
    with in_dev(project) as dev:
        started = dev.wait_for("app.started")
        healthy = dev.wait_for("app.healthy")
        assert healthy["url"] == f"http://127.0.0.1:{port}/healthz"
        assert healthy["ms"] > 0
        app = asked(port)
        assert app["pid"] == app["pgid"] == started["pid"]
        assert app["ppid"] == dev.process.pid
        assert app["argv"][1] == f"--{how}"
        assert app["argv"][2] == str(port) if how == "port" else int(app["argv"][2]) > 2
        assert app["argv"][3] == "{other}", "braces that mean something else stay"
        assert app["cwd"] == str(project)
        env = app["env"]
        assert (env["PORT"], env["COLOUR"], env["SIZE"]) == (str(port), "blue", "big")
        assert (env["TAKO_APP_NAME"], env["TAKO_ENV"]) == ("shop", "development")
        assert env["TAKO_DATA_DIR"] == str(project / ".tako")
        assert app["secrets"] == {"STRIPE_KEY": "sk_"}
        assert "sk_live_51Hx" not in json.dumps(env)
        command = Path(f"/proc/{started['pid']}/cmdline").read_bytes().split(b"\0")
        assert command[1] == str(APP).encode(), "no shell, and nothing of ours, stands before it"


def test_every_process_that_an_app_forks_can_read_the_secrets(home: Home, tmp_path: Path) -> None:
    """A server with several workers imports the app in each of them."""
    code = """
        import os
        children = []
        for n in range(3):
            if os.fork() == 0:
                from tako_runtime import secrets
                os.write(1, f"{n} {len(secrets['STRIPE_KEY'])}\\n".encode())  # in one piece
                os._exit(0)
        for _ in range(3):
            os.wait()
        from tako_runtime import secrets
        print("parent", len(secrets["STRIPE_KEY"]), flush=True)
        try:
            os.wait()
        except ChildProcessError:
            print("no other child", flush=True)
        import time
        time.sleep(3600)
    """
    command = json.dumps(["python", "-c", textwrap.dedent(code)])
    project = make_project(tmp_path / "shop", FLOWS, f'name = "shop"\n[app]\ncommand = {command}\n')
    keep_secrets(home, {"STRIPE_KEY": "sk_live_51Hx"})
    with on_server(home, project) as server:
        server.printed("no other child")
        said = {event["message"] for event in server.saw("output", lambda event: event["source"] == "app")}
        assert {"0 12", "1 12", "2 12", "parent 12"} <= said


@pytest.mark.parametrize("said", ["{}", "{}:0-1"])
def test_a_process_that_was_given_the_number_only_reads_nothing_that_is_not_its_own(said: str, tmp_path: Path) -> None:
    """The number is inherited with the environment; the file is not, and another may be there."""
    code = "from tako_runtime import secrets; print(len(secrets))"
    ours, theirs = os.pipe()
    try:
        os.write(theirs, b"not for tako")
        shown = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"TAKO_SECRETS_FD": said.format(ours)},
            pass_fds=[ours], capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert shown.stdout == "0\n"
        assert os.read(ours, 100) == b"not for tako"
    finally:
        os.close(ours)
        os.close(theirs)


def test_what_the_app_prints_is_in_the_log_as_the_apps_and_secrets_are_masked_in_it(home: Home, tmp_path: Path) -> None:
    code = "import sys; print('hello sk_live_51Hx'); sys.stderr.write('no end of line'); sys.exit(3)"
    command = json.dumps(["python", "-c", code])
    project = make_project(tmp_path / "shop", FLOWS, f'name = "shop"\n[app]\ncommand = {command}\n')
    keep_secrets(home, {"STRIPE_KEY": "sk_live_51Hx"})
    with on_server(home, project) as server:
        hello = server.printed("hello")
        server.printed("no end of line")
        assert hello["message"] == "hello [secret STRIPE_KEY]"
        assert set(hello) == {"at", "level", "event", "message", "source"}
        assert hello["source"] == "app"
        ended = server.wait_for("app.ended")
        assert ended["last_lines"] == "hello [secret STRIPE_KEY]\nno end of line"
        assert ended["message"].endswith("is gone (exit code 3), it is started again in 1s")


def test_in_serve_the_app_gets_the_socket_that_the_service_manager_listens_on(home: Home, tmp_path: Path) -> None:
    port, configured_port = free_port(), free_port()
    project = configured(tmp_path / "shop", "fd", configured_port)
    with socket.create_server(("127.0.0.1", port)) as listening:
        log = home.data_dir / "serve.log"
        with log.open("wb") as out:
            words, options = activated(listening, home, project)
            process = subprocess.Popen(words, **options, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            app = asked(port)  # it waits in the queue until the app is up
            assert app["argv"][2] == "4", "3 is for secrets"
            assert app["env"]["PORT"] == str(port)
            assert not [name for name in app["env"] if name.startswith("LISTEN_")]
            until(lambda: f"http://127.0.0.1:{port}/healthz" in log.read_text())
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
            assert gone(app["pid"])
        finally:
            process.kill()
            process.wait()


def test_a_passed_on_unix_socket_is_taken_and_looked_at_too(home: Home, tmp_path: Path) -> None:
    project = configured(tmp_path / "shop", "fd", free_port())
    path, log = str(home.data_dir / "app.sock"), home.data_dir / "serve.log"
    with socket.socket(socket.AF_UNIX) as listening, log.open("wb") as out:
        listening.bind(path)
        listening.listen()
        words, options = activated(listening, home, project)
        process = subprocess.Popen(words, **options, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            until(lambda: f"the app answers at unix:{path}/healthz" in log.read_text())
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def test_in_serve_the_server_listens_itself_where_nobody_passes_a_socket_on(home: Home, tmp_path: Path) -> None:
    port = free_port()
    project = configured(tmp_path / "shop", "fd", port, '[vars.production]\nCOLOUR = "green"\n')
    with on_server(home, project) as server:
        server.wait_for("app.healthy")
        assert asked(port)["env"]["COLOUR"] == "green"
        assert asked(port)["env"]["TAKO_ENV"] == "production"


def test_a_passed_on_socket_that_the_command_does_not_take_is_a_mistake(home: Home, tmp_path: Path) -> None:
    project = configured(tmp_path / "shop", "port", free_port())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        words, options = activated(listening, home, project)
        ended = subprocess.run(words, **options, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "[app] command does not take it\nPut {fd}" in ended.stderr


# --- its health ------------------------------------------------------------------------------------------------------


def test_an_app_is_healthy_once_it_answers_200(home: Home, tmp_path: Path) -> None:
    port = free_port()
    project = configured(tmp_path / "shop", "fd", port)
    (project / "health").write_text("503")
    with on_server(home, project) as server:
        server.printed("app is up")
        assert asked(port)["pid"] == server.wait_for("app.started")["pid"], "it answers, if not on that path"
        assert not server.saw("app.healthy")
        (project / "health").write_text("200")
        server.wait_for("app.healthy")


def test_an_app_that_never_gets_healthy_is_told_with_what_it_answers_and_left_running(
    home: Home, tmp_path: Path
) -> None:
    project = configured(tmp_path / "shop", "port", free_port())
    (project / "health").write_text("503")
    with on_server(home, project) as server:
        late = until(lambda: server.saw("app.late"), 60)[0]
        assert (late["level"], late["error"]) == ("error", "it answers 503")
        assert late["seconds"] >= 30
        assert not server.saw("app.ended")
        (project / "health").write_text("200")
        server.wait_for("app.healthy")
        (project / "health").write_text("500")
        assert server.wait_for("app.unhealthy")["error"] == "it answers 500"
        (project / "health").write_text("200")
        until(lambda: len(server.saw("app.healthy")) == 2)
        assert len(server.saw("app.late")) == 1


# --- its end ---------------------------------------------------------------------------------------------------------


def test_an_app_that_crashes_is_started_again_and_nobody_who_connects_meanwhile_is_turned_away(tmp_path: Path) -> None:
    port = free_port()
    project = configured(tmp_path / "shop", "fd", port)
    with in_dev(project) as dev:
        first = dev.wait_for("app.started")
        dev.wait_for("app.healthy")
        died(port)
        ended = dev.wait_for("app.ended")
        assert (ended["pid"], ended["how"], ended["pause"]) == (first["pid"], "exit code 7", "1s")
        assert ended["last_lines"].splitlines()[-1] == "about to die"
        second = asked(port)["pid"]  # asked while there is none
        assert dev.wait_for("app.started")["pid"] == second != first["pid"]


def test_the_pauses_grow_while_it_keeps_failing_and_a_reload_makes_nobody_wait(home: Home, tmp_path: Path) -> None:
    project = configured(tmp_path / "shop", "fd", free_port())
    (project / "do").write_text("fail no database")
    with on_server(home, project) as server:
        until(lambda: len(server.saw("app.ended")) == 4, 60)
        assert [event["pause"] for event in server.saw("app.ended")] == ["1s", "2s", "4s", "8s"]
        assert server.saw("app.ended")[-1]["last_lines"] == "app is up\nno database"
        assert server.process.poll() is None, "the workers go on"
        (project / "do").unlink()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("app.healthy")
        assert len(server.saw("app.ended")) == 4


def test_a_program_that_is_not_there_is_named(home: Home, tmp_path: Path) -> None:
    config = 'name = "shop"\n[app]\ncommand = ["no-such-server", "{fd}"]\n'
    project = make_project(tmp_path / "shop", FLOWS, f"{config}port = {free_port()}\n")
    with on_server(home, project) as server:
        ended = server.wait_for("app.ended")
        said = "no-such-server cannot be started: No such file or directory (it was looked for in PATH)"
        assert ended["last_lines"] == said
        assert ended["how"] == "exit code 127"


@pytest.mark.parametrize("how", ["fd", "port"])
def test_a_stop_leaves_nothing_of_the_app_and_frees_its_port(how: str, home: Home, tmp_path: Path) -> None:
    port = free_port()
    project = configured(tmp_path / "shop", how, port)
    (project / "do").write_text("start")
    with on_server(home, project) as server:
        started = server.wait_for("app.started")
        server.wait_for("app.healthy")
        assert len(in_group(started["pid"])) == 3, "the app, what it has started, and the watcher"
        assert server.stop() == 0
        assert server.wait_for("app.stopped")["how"] == "killed by SIGTERM"
        assert in_group(started["pid"]) == []
        assert not server.saw("app.ended")
    socket.create_server(("127.0.0.1", port)).close()


def test_an_app_that_ignores_sigterm_is_killed_after_the_grace(home: Home, tmp_path: Path) -> None:
    project = configured(tmp_path / "shop", "fd", free_port(), '[workflows]\ngrace = "300ms"\n')
    (project / "do").write_text("ignore")
    with on_server(home, project) as server:
        started = server.wait_for("app.started")
        server.wait_for("app.healthy")
        assert server.stop() == 0
        assert server.wait_for("app.stopped")["how"] == "killed by SIGKILL"
        assert in_group(started["pid"]) == []


def test_a_second_ctrl_c_ends_the_app_at_once(tmp_path: Path) -> None:
    project = configured(tmp_path / "shop", "fd", free_port())
    (project / "do").write_text("ignore")
    with in_dev(project) as dev:
        started = dev.wait_for("app.started")
        dev.wait_for("app.healthy")
        dev.send(signal.SIGINT)
        dev.wait_for("dev.stopping")
        dev.send(signal.SIGINT)
        assert dev.ended() == 130
        assert in_group(started["pid"]) == []


@pytest.mark.parametrize("does", ["start", "ignore"])
def test_a_killed_supervisor_leaves_nothing_of_the_app_after_five_seconds(does: str, tmp_path: Path) -> None:
    """What it has started goes too, and what ignores SIGTERM."""
    port = free_port()
    project = configured(tmp_path / "shop", "fd", port)
    (project / "do").write_text(does)
    with in_dev(project) as dev:
        started = dev.wait_for("app.started")
        dev.wait_for("app.healthy")
        os.kill(dev.process.pid, signal.SIGKILL)
        dev.process.wait()
        until(lambda: in_group(started["pid"]) == [], 5)
    socket.create_server(("127.0.0.1", port)).close()


# --- tako dev --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fd", "port"])
def test_a_taken_port_is_told_with_who_has_it_and_the_next_free_one_before_anything_starts(
    how: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        project = configured(tmp_path / "shop", how, port)
        error = document("dev", cwd=project, code=1)["error"]
        assert error["code"] == "refused"
        assert error["message"].startswith(f"port {port} is taken by process {os.getpid()}: python")
        found = re.fullmatch(rf"Port (\d+) is free\. Or stop process {os.getpid()}\.", error["hint"])
        assert found is not None
        free = int(found[1])
        assert free > port
        with in_dev(project, "--port", str(free)) as dev:
            assert dev.wait_for("dev.ready")["url"] == f"http://127.0.0.1:{free}"
            dev.wait_for("app.healthy")
            assert asked(free)["env"]["PORT"] == str(free)


def test_a_second_dev_is_refused_with_the_first_ones_pid_and_not_for_its_port(tmp_path: Path) -> None:
    project = configured(tmp_path / "shop", "fd", free_port())
    with in_dev(project) as dev:
        dev.wait_for("app.healthy")
        error = document("dev", cwd=project, code=1)["error"]
        assert f"process {dev.process.pid}" in error["message"]


def test_without_the_app_nothing_is_started_and_its_port_may_be_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        project = configured(tmp_path / "shop", "fd", int(taken.getsockname()[1]))
        with in_dev(project, "--no-app") as dev:
            assert dev.wait_for("dev.ready")["url"] is None
        assert not [event for event in dev.events if event["event"].startswith("app.")]
        assert "app is up" not in done("dev", "--once", cwd=project)


@pytest.mark.parametrize("words", [["--no-app"], ["--once"], []])
def test_a_port_without_an_app_is_wrong_usage(words: list[str], tmp_path: Path) -> None:
    config = 'name = "shop"\n' + ('[app]\ncommand = ["python"]\n' if words else "")
    project = make_project(tmp_path / "shop", FLOWS, config)
    ended = tako("dev", "--port", "8001", *words, cwd=project)
    assert ended.returncode == 2
    assert "there is no app to start" in ended.stderr


@pytest.mark.parametrize("columns", [60, 80])
def test_the_first_lines_show_where_the_app_is_and_the_log_shows_its_lines(columns: int, tmp_path: Path) -> None:
    port = free_port()
    project = configured(tmp_path / "shop", "fd", port)
    # It ends the command that started it, as Ctrl-C would: there is nobody else at this terminal.
    (project / "stop.py").write_text(
        "import os, signal\nprint('hello', flush=True)\nos.kill(os.getppid(), signal.SIGINT)\nsignal.pause()\n"
    )
    toml = project / "tako.toml"
    toml.write_text(re.sub("command = .*", 'command = ["python", "stop.py", "{fd}"]', toml.read_text()))
    code, shown = at_terminal("dev", cwd=project, columns=columns)
    lines = plain(shown).splitlines()
    assert code == 0, shown
    assert lines[0] == f"tako dev  shop  http://127.0.0.1:{port}"
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d(\.\d{3})? app +hello", line) for line in lines)
    assert max(map(len, lines)) <= columns


# --- in tako status --------------------------------------------------------------------------------------------------


def test_status_says_how_the_app_stands_while_its_supervisor_lives(tmp_path: Path) -> None:
    port = free_port()
    project = configured(tmp_path / "shop", "fd", port)

    def process() -> Any:
        return document("status", cwd=project)["status"]["process"]

    assert process() is None
    with in_dev(project) as dev:
        started = dev.wait_for("app.started")
        dev.wait_for("app.healthy")
        found = until(lambda: (one := process())["state"] == "healthy" and one)
        assert (found["pid"], found["url"]) == (started["pid"], f"http://127.0.0.1:{port}/healthz")
        [line] = re.findall(r"^process +(.*)$", done("status", cwd=project), re.MULTILINE)
        assert re.fullmatch(
            rf"the app answers at http://127.0.0.1:{port}/healthz, .* after its start \(\d+s ago\)", line
        )
        assert max(map(len, plain(at_terminal("status", cwd=project, columns=60)[1]).splitlines())) <= 60
        died(port)
        dev.wait_for("app.ended")
        until(lambda: process()["pid"] != started["pid"])
        dev.send(signal.SIGKILL)
        dev.process.wait()
        assert process() is None, "nobody stands behind what was said"
    with in_dev(project, "--no-app") as dev:
        dev.wait_for("dev.ready")
        until(lambda: document("status", cwd=project)["status"]["supervisor"])
        assert process() is None
