"""`python -m tako_runtime serve`, as a service manager runs it: one at a time, its processes, its signals, its news."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli import make_project
from conftest import until
from workers import gone, now, status, workers

from tako_runtime import clock
from tako_runtime.control import Control
from tako_runtime.store import Home
from tako_runtime.store.base import Enqueue
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import new_run

# They run processes of their own.
pytestmark = pytest.mark.slow

FLOWS = """
    import subprocess
    import time
    from pathlib import Path
    from tako_runtime import workflow

    @workflow("greet")
    async def greet(payload, step):
        return payload

    @workflow("mail", group="email")
    async def mail(payload, step):
        return payload

    @workflow("hold")
    async def hold(payload, step):
        await step.run("held", held)

    def held():
        child = subprocess.Popen(["sleep", "600"])
        Path("child").write_text(f"{child.pid}\\n")
        while not Path("go").exists():
            time.sleep(0.02)

    @workflow("hangs")
    async def hangs(payload, step):
        held()
"""


class Serving:
    def __init__(self, project: Path, home: Home, words: tuple[str, ...], env: dict[str, str]) -> None:
        self.log = home.data_dir / f"serve-{os.urandom(4).hex()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tako_runtime", "serve", "--log-level", "debug", *words], cwd=project,
                env={**os.environ, **home.environment(), **env}, stdout=log, stderr=log,
            )  # fmt: skip
        self.pid = self.process.pid

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_bytes().split(b"\n")[:-1]
        found = [msgspec.json.decode(line) for line in lines if line.startswith(b"{")]
        return [event for event in found if event["event"] == name]

    @property
    def spawned(self) -> list[int]:
        return [event["pid"] for event in self.events("worker.spawned")]

    def terminate(self) -> None:
        self.process.terminate()

    def ended(self) -> int:
        return self.process.wait(60)


@contextmanager
def serving(project: Path, home: Home, *words: str, **env: str) -> Iterator[Serving]:
    server = Serving(project, home, words, env)
    try:
        yield server
        if server.process.poll() is None:
            server.terminate()
            assert server.ended() == 0, server.log.read_text()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        for pid in server.spawned:
            if not gone(pid):
                os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", FLOWS, 'name = "shop"\n[workflows]\nconcurrency = 3\n')


def configure(project: Path, text: str) -> None:
    (project / "tako.toml").write_text(textwrap.dedent(f'name = "shop"\n{text}'))


def enqueue(opened: StoreThread, workflow: str, group: str = "default") -> str:
    new = new_run(workflow, group, "null", now=now(), due=now(), retries=2, backoff_base=1, backoff_max=1)
    [run_id] = opened.do_sync(Enqueue(runs=[new], now=now()))
    return run_id


def succeeded(opened: StoreThread, run_id: str) -> bool:
    return status(opened, run_id)[0] == "succeeded"


def held(project: Path) -> int:
    """The process that a held step has started."""
    return int(until(lambda: (project / "child").exists() and (project / "child").read_text().endswith("\n") and
                     (project / "child").read_text()))  # fmt: skip


# --- one at a time, and whose children -------------------------------------------------------------------------------


def test_a_second_supervisor_of_an_app_is_refused_with_the_process_id_of_the_first(
    opened: StoreThread, home: Home, project: Path
) -> None:
    configure(project, "[workflows]\nworkers = 1\n")
    with serving(project, home) as first:
        until(lambda: workers(opened))
        second = Serving(project, home, (), {})
        assert second.ended() == 1
        assert f"another supervisor runs this app: process {first.pid}\n" in second.log.read_text()
        assert second.spawned == []
        assert first.process.poll() is None


def test_each_worker_is_a_direct_child_that_leads_a_process_group_of_its_own(
    opened: StoreThread, home: Home, project: Path
) -> None:
    configure(project, "[workflows]\nworkers = 2\n[workflows.email]\n")
    with serving(project, home) as server:
        until(lambda: len(workers(opened)) == 4)
        for pid in server.spawned:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            assert int(fields[1]) == server.pid
            assert os.getpgid(pid) == pid
            assert Path(f"/proc/{pid}/exe").readlink() == Path(f"/proc/{server.pid}/exe").readlink(), "no shell"
        assert sorted(workers(opened).values()) == sorted(server.spawned)


def test_user_code_is_imported_by_the_manifest_and_the_workers_and_never_by_the_supervisor(
    opened: StoreThread, home: Home, project: Path
) -> None:
    flows = project / "workflows" / "flows.py"
    note = "import os\nwith open('importers', 'a') as file: file.write(f'{os.getpid()} {os.getppid()}\\n')\n"
    flows.write_text(note + textwrap.dedent(FLOWS))
    with serving(project, home) as server:
        run_id = enqueue(opened, "greet")
        until(lambda: succeeded(opened, run_id))
        importers = [tuple(map(int, line.split())) for line in (project / "importers").read_text().splitlines()]
        [worker] = server.spawned
        assert worker in {pid for pid, _ in importers}
        assert len(importers) >= 2, "the manifest's process did too"
        assert server.pid not in {pid for pid, _ in importers}


@pytest.mark.parametrize("flow", ["hold", "hangs"])
def test_a_killed_supervisor_leaves_no_orphan_and_the_next_one_has_n_workers_and_not_one_more(
    opened: StoreThread, home: Home, project: Path, flow: str
) -> None:
    """Though a step is busy with a program of its own, or the event loop hangs."""
    configure(project, "[workflows.default]\nworkers = 2\n")
    with serving(project, home) as first:
        until(lambda: len(workers(opened)) == 2)
        run_id = enqueue(opened, flow)
        program = held(project)
        first.process.kill()
        first.process.wait()
        killed = now()
        with serving(project, home) as second:
            until(lambda: all(gone(pid) for pid in (*first.spawned, program)))
            assert now() - killed < 6 * clock.SECOND
            (project / "go").touch()
            until(lambda: succeeded(opened, run_id))
            until(lambda: sorted(workers(opened).values()) == sorted(second.spawned))
            assert len(second.spawned) == 2


def test_an_import_that_hangs_does_not_outlive_its_supervisor(opened: StoreThread, home: Home, project: Path) -> None:
    (project / "workflows" / "flows.py").write_text("import sys, time\nif 'worker' in sys.argv: time.sleep(600)\n")
    configure(project, "[workflows]\nworkers = 1\n")
    with serving(project, home) as server:
        until(lambda: server.spawned)
        until(lambda: "worker" in Path(f"/proc/{server.spawned[0]}/cmdline").read_text())
        server.process.kill()
        server.process.wait()
        until(lambda: gone(server.spawned[0]))


def test_what_a_killed_worker_has_started_goes_with_it(opened: StoreThread, home: Home, project: Path) -> None:
    with serving(project, home) as server:
        run_id = enqueue(opened, "hold")
        program = held(project)
        os.kill(server.spawned[0], signal.SIGKILL)
        until(lambda: gone(program))
        (project / "go").touch()
        until(lambda: succeeded(opened, run_id))


def test_what_a_step_has_started_goes_with_the_drain(opened: StoreThread, home: Home, project: Path) -> None:
    configure(project, '[workflows]\ngrace = "500ms"\n')
    with serving(project, home) as server:
        run_id = enqueue(opened, "hold")
        program = held(project)
        server.terminate()
        assert server.ended() == 0
        assert gone(program)
        assert all(gone(pid) for pid in server.spawned)
    assert status(opened, run_id)[0] == "pending"


@pytest.mark.parametrize("signals", [1, 2])
def test_one_sigterm_drains_and_a_second_one_changes_nothing(
    opened: StoreThread, home: Home, project: Path, signals: int
) -> None:
    """Nor does it where the service manager sends it to the workers too."""
    with serving(project, home) as server:
        run_id = enqueue(opened, "hold")
        held(project)
        for _ in range(signals):
            for pid in (server.pid, *server.spawned):
                os.kill(pid, signal.SIGTERM)
        until(lambda: server.events("worker.draining"))
        assert status(opened, run_id)[0] == "running"
        (project / "go").touch()
        assert server.ended() == 0
        assert server.events("group.unhealthy") == []
    run = Control(opened).find(run_id)
    assert (run.status in ("succeeded", "pending"), run.attempt, run.losses) == (True, 1, 0), "no attempt was used up"
    assert workers(opened) == {}


# --- groups, from the file and from the workflows --------------------------------------------------------------------


def test_a_group_that_a_workflow_names_and_no_config_inherits_the_base_and_not_the_default_group(
    opened: StoreThread, home: Home, project: Path
) -> None:
    configure(project, "[workflows]\nconcurrency = 3\nworkers = 2\n[workflows.default]\nconcurrency = 9\nworkers = 0\n")
    with serving(project, home) as server:
        until(lambda: len(server.events("worker.started")) == 2)
        run_id = enqueue(opened, "greet")
        until(lambda: succeeded(opened, run_id))
        until(lambda: len(server.events("worker.started")) == 3)
        started = sorted((e["group"], e["concurrency"]) for e in server.events("worker.started"))
        assert started == [("default", 9), ("email", 3), ("email", 3)]


def test_runs_that_nobody_can_take_start_no_worker_and_are_told_once_until_a_file_declares_them(
    opened: StoreThread, home: Home, project: Path
) -> None:
    with serving(project, home) as server:
        lost = enqueue(opened, "renamed")
        [told] = until(lambda: server.events("group.undeclared"))
        assert (told["group"], told["workflow"]) == ("default", "renamed")
        also = enqueue(opened, "renamed")
        mailed = enqueue(opened, "mail", "email")
        until(lambda: succeeded(opened, mailed))
        assert {event["group"] for event in server.events("worker.spawned")} == {"email"}
        assert len(server.events("group.undeclared")) == 1
        flows = project / "workflows" / "flows.py"
        flows.write_text(flows.read_text().replace('"greet"', '"renamed"'))
        until(lambda: succeeded(opened, lost) and succeeded(opened, also))


def test_a_broken_file_that_may_hold_the_workflow_is_said_to_be_why(
    opened: StoreThread, home: Home, project: Path
) -> None:
    flows = project / "workflows" / "flows.py"
    whole = flows.read_text()
    flows.write_text(f"{whole}import nowhere_at_all\n".replace("@workflow", "#@workflow"))
    with serving(project, home) as server:
        run_id = enqueue(opened, "greet")
        [told] = until(lambda: server.events("group.unhealthy"))
        assert "No module named 'nowhere_at_all'" in told["reason"]
        flows.write_text(whole)
        until(lambda: succeeded(opened, run_id))


# --- news for the service manager ------------------------------------------------------------------------------------


@contextmanager
def manager(folder: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket such as systemd's: its path, and where its news arrive."""
    path = str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(path)
        heard.settimeout(30)
        yield path, heard


def news(heard: socket.socket, *but: str) -> str:
    while (said := heard.recv(4096).decode()) in but:
        pass
    return said


def test_the_service_manager_is_told_ready_reloading_and_stopping(
    opened: StoreThread, home: Home, project: Path
) -> None:
    configure(project, "[workflows]\nworkers = 1\n")
    with manager(home.data_dir) as (path, heard), serving(project, home, NOTIFY_SOCKET=path) as server:
        assert news(heard) == "READY=1"
        until(lambda: workers(opened))
        environ = Path(f"/proc/{server.spawned[0]}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" not in environ, "workers have nothing to tell it"
        flows = project / "workflows" / "flows.py"
        flows.write_text(flows.read_text().replace('"greet"', '"welcome"'))
        before = clock.monotonic()
        server.process.send_signal(signal.SIGHUP)
        reloading, _, since = news(heard).partition("\n")
        assert reloading == "RELOADING=1"
        assert before <= int(since.removeprefix("MONOTONIC_USEC=")) <= clock.monotonic()
        assert news(heard) == "READY=1"
        server.terminate()
        assert news(heard) == "STOPPING=1"
        assert server.ended() == 0


def test_the_watchdog_is_fed_while_the_supervisors_loop_goes_round_and_not_while_it_stands(
    opened: StoreThread, home: Home, project: Path
) -> None:
    """Another process holds the store: the event loop turns, and nothing gets on."""
    with (
        manager(home.data_dir) as (path, heard),
        serving(project, home, NOTIFY_SOCKET=path, WATCHDOG_USEC="3000000"),
        (home.app_dir / "runs.db-lock").open("rb") as lock,
    ):
        assert news(heard) == "READY=1"
        for _ in range(3):
            assert news(heard) == "WATCHDOG=1"
        fcntl.flock(lock, fcntl.LOCK_EX)
        heard.settimeout(8)
        with pytest.raises(TimeoutError):  # at its next write, it stands
            assert [news(heard) for _ in range(5)] == []
        fcntl.flock(lock, fcntl.LOCK_UN)
        heard.settimeout(30)
        assert news(heard) == "WATCHDOG=1"


def test_no_watchdog_is_fed_that_another_process_is_meant_for(opened: StoreThread, home: Home, project: Path) -> None:
    told = {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    with manager(home.data_dir) as (path, heard), serving(project, home, NOTIFY_SOCKET=path, **told) as server:
        assert news(heard) == "READY=1"
        run_id = enqueue(opened, "greet")
        until(lambda: succeeded(opened, run_id))
        server.terminate()
        assert news(heard) == "STOPPING=1"
