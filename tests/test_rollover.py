"""The roll-over between two `serve` processes: what a release has to prove, and what the old one notices of it."""

import json
import signal
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from cli import is_alive, make_project
from conftest import until
from serving import Serving, keep_secrets, newer_tako, serving
from test_app import APP, asked, end_apps, free_port
from workers import now, shown, status, workers

from tako_runtime import clock, rotation, store
from tako_runtime.rollover import LINES, NOT_TAKEN
from tako_runtime.store import Home, Local, version
from tako_runtime.store.base import Enqueue, SendSignal
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import new_run

pytestmark = pytest.mark.slow  # what is watched for a while takes that while

FLOWS = """
    import asyncio
    import os
    from pathlib import Path
    from tako_runtime import workflow

    def here():
        return os.environ["TAKO_RELEASE"]

    @workflow("greet")
    async def greet(payload, step):
        return await step.run("where", here)

    @workflow("ask")
    async def ask(payload, step):
        first = await step.run("first", here)
        await step.wait_for("go")
        return [first, await step.run("second", here)]

    @workflow("hold", retries=0)
    async def hold(payload, step):
        first = await step.run("first", here)
        held = await step.run("held", hold_on)
        return [first, held, await step.run("last", here)]

    async def hold_on():
        with Path("{folder}/held").open("a") as file:
            file.write(here() + "\\n")
        while not Path("{folder}/go").exists():
            await asyncio.sleep(0.02)
        return here()
"""


#: An app as a server for production is: on SIGTERM it takes nothing new, and ends what it has begun.
CAREFUL = """
    import asyncio, os, signal, socket, sys

    handlers = set()

    async def answer(reader, writer):
        handlers.add(task := asyncio.current_task())
        try:
            await reader.readuntil(b"\\r\\n\\r\\n")
            await asyncio.sleep(0.02)
            body = os.environ["TAKO_RELEASE"].encode()
            head = b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
            writer.write(head + body)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            handlers.discard(task)

    async def main():
        server = await asyncio.start_server(answer, sock=socket.socket(fileno=int(sys.argv[1])))
        over = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
        await over.wait()
        server.close()
        await asyncio.sleep(0)  # what was taken a moment ago becomes a handler
        while handlers:
            await asyncio.wait(set(handlers))

    asyncio.run(main())
"""


class Two:
    """Releases of one app, and the servers that run them."""

    def __init__(self, folder: Path, home: Home, opened: StoreThread) -> None:
        self.folder, self.home, self._opened = folder, home, opened
        self.on_trial = folder / "on-trial"

    def release(self, name: str, config: str = "", more: str = "") -> Path:
        flows = textwrap.dedent(FLOWS).replace("{folder}", str(self.folder)) + textwrap.dedent(more)
        return make_project(self.folder / name, flows, f'name = "shop"\n{textwrap.dedent(config)}')

    @contextmanager
    def serving(self, project: Path, **env: str) -> Iterator[Serving]:
        words = ("--on-trial", str(self.on_trial))
        with serving(self.home, project, *words, env={"TAKO_RELEASE": project.name, **env}) as server:
            try:
                yield server
            finally:
                if server.process.poll() is None:
                    server.stop()
                end_apps(server.events)

    def try_out(self, name: str) -> None:
        """The release of that name proves itself first, when it is started."""
        self.on_trial.write_text(f"{name}\n")

    def refused(self, project: Path, **env: str) -> tuple[str, list[str]]:
        """Why a release is not taken, and the last lines of what failed."""
        self.try_out(project.name)
        words = ("--on-trial", str(self.on_trial))
        server = Serving(self.home, project, {"TAKO_RELEASE": project.name, **env}, words)
        assert server.process.wait(120) == NOT_TAKEN, server.log.read_text()
        report = json.loads((self.home.app_dir / "trial.json").read_text())
        assert report["release"] == project.name
        assert report["error"] in server.log.read_text()
        return report["error"], report["last_lines"]

    def start(self, workflow: str, retries: int = 2) -> str:
        new = new_run(workflow, "default", "null", now=now(), due=now(), retries=retries, backoff_base=1, backoff_max=1)
        [run_id] = self._opened.do_sync(Enqueue(runs=[new], now=now()))
        return run_id

    def result(self, run_id: str) -> Any:
        until(lambda: status(self._opened, run_id)[0] == "succeeded", 60)
        return shown(self._opened, run_id)["result"]


@pytest.fixture
def two(tmp_path: Path, home: Home, opened: StoreThread) -> Two:
    return Two(tmp_path, home, opened)


def took_over(new: Serving, old: Serving) -> None:
    """Once the new one runs alone; the old one has ended well."""
    new.wait_for("server.took_over")
    assert old.process.wait(60) == 0


# --- taken -----------------------------------------------------------------------------------------------------------


def test_a_parked_run_ends_on_the_new_release_with_its_finished_steps_kept(two: Two, opened: StoreThread) -> None:
    with two.serving(two.release("one")) as old:
        run_id = two.start("ask")
        until(lambda: status(opened, run_id) == ("pending", "waiting"))
        two.try_out("two")
        with two.serving(two.release("two")) as new:
            took_over(new, old)
            opened.do_sync(SendSignal(name="go", payload="1", now=now(), expires_at=now() + clock.DAY))
            assert two.result(run_id) == ["one", "two"]
            assert shown(opened, run_id)["attempt"] == 1


def test_a_running_attempt_stops_at_its_next_step_and_goes_on_there_without_an_attempt_used(
    two: Two, opened: StoreThread
) -> None:
    with two.serving(two.release("one")) as old:
        run_id = two.start("hold", retries=0)
        until(lambda: (two.folder / "held").exists())
        two.try_out("two")
        with two.serving(two.release("two")) as new:
            new.wait_for("server.took_over")
            (two.folder / "go").touch()  # the step ends while the old one drains
            assert two.result(run_id) == ["one", "one", "two"]
            took_over(new, old)
    assert (two.folder / "held").read_text() == "one\n"


def test_a_step_that_outlasts_the_grace_is_cut_off_and_its_run_goes_on_there_without_an_attempt_used(
    two: Two, opened: StoreThread
) -> None:
    config = '[workflows]\ngrace = "1s"\n'
    with two.serving(two.release("one", config)) as old:
        run_id = two.start("hold", retries=0)  # a single attempt: were it used up, the run would be dead
        until(lambda: (two.folder / "held").exists())
        two.try_out("two")
        with two.serving(two.release("two", config)) as new:
            took_over(new, old)
            until(lambda: (two.folder / "held").read_text() == "one\ntwo\n")
            (two.folder / "go").touch()
            assert two.result(run_id) == ["one", "two", "two"]


@pytest.mark.parametrize("dialect", ["postgres"])
def test_local_runs_go_on_under_a_release_where_their_workflow_is_local_no_longer(
    two: Two, opened: StoreThread, home: Home
) -> None:
    """One that is parked and one that is running. They end in the store in which they were begun."""
    config, local = f'[storage]\nurl = "{home.url}"\n', Local(home)

    def release(name: str, local: str) -> Path:
        project = two.release(name, config)
        flows = project / "workflows" / "flows.py"
        text = flows.read_text().replace('@workflow("ask"', f'@workflow("ask"{local}')
        flows.write_text(text.replace('@workflow("hold"', f'@workflow("hold"{local}'))
        return project

    with two.serving(release("one", ", local=True")) as old:
        own = local.made()
        here = Two(two.folder, home, own)
        parked, running = here.start("ask"), here.start("hold", retries=0)
        until(lambda: status(own, parked) == ("pending", "waiting") and (two.folder / "held").exists())
        two.try_out("two")
        with two.serving(release("two", "")) as new:
            new.wait_for("server.took_over")
            (two.folder / "go").touch()
            own.do_sync(SendSignal(name="go", payload="1", now=now(), expires_at=now() + clock.DAY))
            assert here.result(running) == ["one", "one", "two"]
            assert here.result(parked) == ["one", "two"]
            took_over(new, old)
    assert (shown(own, parked)["attempt"], shown(own, running)["attempt"]) == (1, 1)
    local.close()


@pytest.mark.parametrize("dialect", ["postgres"])
def test_a_release_whose_own_store_cannot_be_opened_is_not_taken(two: Two, home: Home) -> None:
    home.app_dir.mkdir(parents=True, exist_ok=True)
    home.file.write_bytes(b"no database at all, and longer than the hundred bytes of a header" * 10)
    error, _ = two.refused(two.release("two", f'[storage]\nurl = "{home.url}"\n'))
    assert "runs.db" in error


def test_the_new_release_claims_while_the_old_one_still_drains(two: Two, opened: StoreThread) -> None:
    with two.serving(two.release("one")) as old:
        two.start("hold")
        until(lambda: (two.folder / "held").exists())
        two.try_out("two")
        with two.serving(two.release("two")) as new:
            new.wait_for("server.took_over")
            assert two.result(two.start("greet")) == "two"
            assert old.process.poll() is None, "it drains"
            (two.folder / "go").touch()
            took_over(new, old)


def test_no_request_fails_while_the_app_rolls_over_on_a_socket_that_outlives_it(two: Two) -> None:
    """The service manager holds it: here, this test does."""
    config = '[app]\ncommand = ["python", "app.py", "{fd}"]\nhealth = "/healthz"\n'
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        port = listening.getsockname()[1]
        listening.set_inheritable(True)
        with passing_on(two, listening, app_of(two.release("one", config), CAREFUL)) as old:
            until(lambda: old.saw("app.healthy"))
            hammer = Hammer(port)
            try:
                two.try_out("two")
                with passing_on(two, listening, app_of(two.release("two", config), CAREFUL)) as new:
                    took_over(new, old)
                    until(lambda: hammer.answers[-1] == "two")
                    hammer.stop()
            finally:
                hammer.stop()
        assert set(hammer.answers) == {"one", "two"}


@contextmanager
def passing_on(two: Two, listening: socket.socket, project: Path) -> Iterator[Serving]:
    """A server to which the socket is passed on as systemd does it: number 3, and named by its own process id."""
    import sys

    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')"
    )
    code += "; os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"

    class Passing(Serving):
        def __init__(self, home: Home, root: Path, env: Any, words: tuple[str, ...]) -> None:
            import os
            import subprocess

            self.log = home.data_dir / f"serve{env['TAKO_RELEASE']}.log"
            told = ["-m", "tako_runtime", "serve", "--log-level", "debug", *words]
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code, str(listening.fileno()), *told], cwd=root, stdout=log, stderr=log,
                    env={**os.environ, **home.environment(), **env}, stdin=subprocess.DEVNULL,
                    pass_fds=[listening.fileno()],
                )  # fmt: skip

    server = Passing(two.home, project, {"TAKO_RELEASE": project.name}, ("--on-trial", str(two.on_trial)))
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        end_apps(server.events)


class Hammer:
    """Requests, one after the other, by four at once, until `stop()`; which release has answered each."""

    def __init__(self, port: int) -> None:
        self.answers: list[str] = []
        self._failures: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(port,)) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _ask(self, port: int) -> None:
        try:
            while not self._over.is_set():
                with urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                    self.answers.append(answer.read().decode())
        except BaseException as error:
            self._failures.append(error)

    def stop(self) -> None:
        """Every one of them has to have been answered."""
        self._over.set()
        for thread in self._threads:
            thread.join(30)
        assert self._failures == []


def test_an_app_that_binds_its_port_itself_takes_it_once_the_old_one_has_left_it(two: Two) -> None:
    port = free_port()
    config = f'[app]\ncommand = ["python", "{APP}", "--port", "{{port}}"]\nport = {port}\nhealth = "/healthz"\n'
    with two.serving(two.release("one", config)) as old:
        until(lambda: old.saw("app.healthy"))
        two.try_out("two")
        with two.serving(two.release("two", config)) as new:
            took_over(new, old)
            new.wait_for("app.healthy", lambda event: str(port) in event["url"])
            assert asked(port)["env"]["TAKO_RELEASE"] == "two"


def test_without_a_trial_a_second_one_is_refused_as_ever(two: Two) -> None:
    with two.serving(two.release("one")) as old:
        assert two.result(two.start("greet")) == "one"
        assert old.saw("server.trial") == []
        second = Serving(two.home, two.release("two"), {"TAKO_RELEASE": "two"}, ("--on-trial", str(two.on_trial)))
        assert second.process.wait(60) == 1
        assert "another supervisor runs this app" in second.log.read_text()


def test_the_first_release_of_all_proves_itself_too(two: Two) -> None:
    two.try_out("one")
    with two.serving(two.release("one")) as server:
        until(lambda: (two.home.app_dir / "trial.json").exists())
        until(lambda: json.loads((two.home.app_dir / "trial.json").read_text())["stage"] == "taken")
        assert two.result(two.start("greet")) == "one"
        assert server.saw("server.took_over") == []


def test_after_a_rotation_whoever_still_has_the_old_value_is_named_under_whichever_release(two: Two) -> None:
    port = free_port()
    config = f'[app]\ncommand = ["python", "app.py", "{port}"]\nport = {port}\n[workflows]\ngrace = "60s"\n'
    stubborn = """
        import os, signal, sys, time
        from pathlib import Path
        on_trial = os.environ["PORT"] != sys.argv[1]
        def end(*_):
            while not (on_trial or (Path.cwd().parent / "go").exists()):
                time.sleep(0.02)
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        print("the app is there", flush=True)
        while True:
            signal.pause()
    """
    keep_secrets(two.home, {"KEY": "before-1"})
    with two.serving(app_of(two.release("one", config), stubborn)) as old:
        old.printed("the app is there")
        two.start("hold")
        until((two.folder / "held").exists)
        two.try_out("two")
        with two.serving(app_of(two.release("two", config), stubborn)) as new:
            new.wait_for("server.took_over")
            new.printed("the app is there")
            two.result(two.start("greet"))
            assert rotation.standing(two.home.app_dir) == {"unread": False, "old": []}
            keep_secrets(two.home, {"KEY": "after-12"})
            assert rotation.standing(two.home.app_dir)["unread"]
            new.process.send_signal(signal.SIGHUP)
            new.wait_for("secret.changed")
            two.result(two.start("greet"))  # by a worker that has the new one
            wanted = {("a worker of default", "one"), ("the app", "one"), ("the app", "two")}
            until(lambda: {(each["what"], each["release"]) for each in held(two)} == wanted)
            assert all(is_alive(each["pid"]) for each in held(two))
            (two.folder / "go").touch()
            until(lambda: rotation.standing(two.home.app_dir) == {"unread": False, "old": []})
            assert old.process.wait(60) == 0


def held(two: Two) -> list[dict[str, Any]]:
    return list(rotation.standing(two.home.app_dir)["old"])


# --- not taken -------------------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(two: Two, opened: StoreThread, config: str = "") -> Iterator[Serving]:
    """An old release that, at the end, has not noticed anything."""
    with two.serving(two.release("one", config)) as old:
        until(lambda: (two.home.app_dir / "supervisor.pid").exists())
        assert two.result(two.start("greet")) == "one"
        before = workers(opened)
        yield old
        assert workers(opened) == before
        assert old.saw("server.handed_over") == []
        assert two.result(two.start("greet")) == "one"
        assert old.process.poll() is None


def test_a_release_with_an_import_error_is_not_taken(two: Two, opened: StoreThread) -> None:
    with undisturbed(two, opened):
        error, lines = two.refused(two.release("two", more="import no_such_module\n"))
    assert "flows.py" in error
    assert "No module named 'no_such_module'" in error
    assert lines[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_a_release_whose_worker_cannot_boot_is_not_taken(two: Two, opened: StoreThread) -> None:
    bad = "import sys\nif 'worker' in sys.argv:\n    print('no licence', flush=True)\n    import os; os._exit(9)\n"
    with undisturbed(two, opened):
        error, lines = two.refused(two.release("two", more=bad))
    assert error == "a worker of group default ended (exit code 9)"
    assert "no licence" in lines


def test_a_release_whose_worker_crashes_after_three_seconds_is_not_taken(two: Two, opened: StoreThread) -> None:
    bad = """
        import os, sys, threading
        if "worker" in sys.argv:
            threading.Timer(3, lambda: (print("out of memory", flush=True), os.abort())).start()
    """
    with undisturbed(two, opened):
        error, lines = two.refused(two.release("two", more=bad))
    assert error == "a worker of group default ended (killed by SIGABRT)"
    assert "out of memory" in lines


def test_a_release_with_a_newer_tako_that_is_not_taken_leaves_a_store_that_the_one_before_works_on_with(
    two: Two, opened: StoreThread, dialect: str
) -> None:
    bad = "import os, sys, threading\nif 'worker' in sys.argv:\n    threading.Timer(3, lambda: os._exit(9)).start()\n"
    with undisturbed(two, opened):
        error, _ = two.refused(two.release("two", more=bad), PYTHONPATH=str(newer_tako(two.folder / "newer")))
    assert error == "a worker of group default ended (exit code 9)"
    seen = store.examine(two.home)
    assert seen is not None
    assert seen.version == version.newest(dialect) + 1, "it had opened the store, and so migrated it"
    with two.serving(two.folder / "one") as again:  # every process of it opens the store anew
        run_id = two.start("ask")
        until(lambda: status(opened, run_id) == ("pending", "waiting"))
        opened.do_sync(SendSignal(name="go", payload="1", now=now(), expires_at=now() + clock.DAY))
        assert two.result(run_id) == ["one", "one"]
        assert again.saw("worker.started")


APP_CONFIG = '[app]\ncommand = ["python", "app.py", "{port}"]\nport = %d\n'


def app_of(project: Path, code: str) -> Path:
    (project / "app.py").write_text(textwrap.dedent(code))
    return project


def test_a_release_whose_app_crashes_after_three_seconds_is_not_taken(two: Two, opened: StoreThread) -> None:
    config = APP_CONFIG % free_port()
    crashing = """
        import time
        for number in range(40):
            print(f"line {number}", flush=True)
        time.sleep(3)
        raise SystemExit("the database is gone")
    """
    with undisturbed(two, opened):
        error, lines = two.refused(app_of(two.release("two", config), crashing))
    assert error == "the app ended (exit code 1)"
    assert len(lines) == LINES
    assert lines[-2:] == ["line 39", "the database is gone"]


def test_a_release_whose_app_never_gets_healthy_is_not_taken(two: Two, opened: StoreThread) -> None:
    config = APP_CONFIG % free_port() + 'health = "/healthz"\n'
    sick = """
        import http.server, sys
        print("trying to reach the database", flush=True)
        class Sick(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_error(503)
            def log_message(self, *_): ...
        http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Sick).serve_forever()
    """
    with undisturbed(two, opened):
        error, lines = two.refused(app_of(two.release("two", config), sick))
    assert error == "the app does not answer 200 within 60 s: it answers 503"
    assert "trying to reach the database" in lines


def test_a_release_that_would_get_no_lock_is_not_taken(two: Two, opened: StoreThread) -> None:
    """The old supervisor hangs: it is for its service manager to end it."""
    with two.serving(two.release("one")) as old:
        assert two.result(two.start("greet")) == "one"
        old.process.send_signal(signal.SIGSTOP)
        try:
            error, _ = two.refused(two.release("two"))
        finally:
            old.process.send_signal(signal.SIGCONT)
        assert error == f"the supervisor (process {old.process.pid}) does not hand over within 10 s"
