"""A project that is deployed to servers of our own, and a look at what it does there."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli import TAKO, environment
from conftest import until
from machines import CACHE, Machine

FLOWS = """
    import os
    import time

    from tako_runtime import workflow

    def here():
        return os.environ["TAKO_RELEASE"]

    @workflow("greet")
    async def greet(payload, step):
        return await step.run("greet", here)

    @workflow("ask")
    async def ask(payload, step):
        first = await step.run("first", here)
        await step.wait_for("go")
        return [first, await step.run("second", here)]

    @workflow("long", retries=0)
    async def long(payload, step):
        first = await step.run("first", here)
        await step.run("ten-minutes", time.sleep, 600 if first == here() else 0)
        return [first, here()]
"""

#: As a server for production is: on SIGTERM it takes nothing new, and ends what it has begun.
APP = """
    import asyncio, os, signal, socket, sys
    from pathlib import Path

    handlers = set()

    async def answer(reader, writer):
        handlers.add(task := asyncio.current_task())
        try:
            await reader.readuntil(b"\\r\\n\\r\\n")
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
        server = await asyncio.start_server(answer, sock=socket.socket(fileno=int(sys.argv[1])), backlog=4096)
        over = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
        await over.wait()
        asyncio.get_running_loop().remove_reader(server.sockets[0].fileno())
        while asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.sleep(0.01)
        server.close()

    asyncio.run(main())
"""

#: So many requests a second, each on a connection of its own, until its input ends; then how they went, as JSON. The
#: server's own python3 runs it, which may be 3.10.
HAMMER = """
    import asyncio, collections, json, resource, sys

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    answers, failures = collections.Counter(), []

    async def answered(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        said = await reader.read()
        writer.close()
        assert said.startswith(b"HTTP/1.1 200"), said
        return said.rpartition(b"\\r\\n")[2].decode()

    async def ask(port):
        try:
            answers[await asyncio.wait_for(answered(port), 20)] += 1
        except BaseException as error:
            failures.append(repr(error))

    async def main(port, rate):
        loop = asyncio.get_running_loop()
        over = loop.run_in_executor(None, sys.stdin.read)
        asking, begun, count = set(), loop.time(), 0
        while not over.done():
            while count < (loop.time() - begun) * rate:
                count += 1
                task = loop.create_task(ask(port))
                asking.add(task)
                task.add_done_callback(asking.discard)
            await asyncio.sleep(0.001)
        await asyncio.gather(*asking)
        took = loop.time() - begun
        print(json.dumps({"asked": count, "seconds": took, "answers": answers, "failures": failures}))

    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
"""


#: An app that listens there.
PORT = 8123
WITH_APP = f"""
    [app]
    command = ["python", "app.py", "{{fd}}"]
    port = {PORT}
    health = "/healthz"
"""


class Shop:
    """The project. What `pack` has found out of its dependencies is shared by all."""

    def __init__(self, folder: Path, servers: dict[str, Machine], user: str = "root", more: str = "") -> None:
        self.folder, self.servers, self.user = folder, servers, user
        self.first = next(iter(servers.values()))
        self.tako_from: Path | None = None  # where the runtime is imported from, if not from here
        (folder / "workflows").mkdir(parents=True)
        kept = CACHE / "packed"
        kept.mkdir(parents=True, exist_ok=True)
        (folder / ".tako" / "deploy").mkdir(parents=True)
        for name in ("locks", "wheels"):
            (kept / name).mkdir(exist_ok=True)
            (folder / ".tako" / "deploy" / name).symlink_to(kept / name)
        self.configure(more)
        self.write("workflows/flows.py", FLOWS)

    def configure(self, more: str = "", deploy: str = "vendor = true") -> None:
        named = ", ".join(f'"{name}"' for name in self.servers)
        hosts = "".join(f'[servers.{name}]\nhost = "{self.user}@{name}"\n' for name in self.servers)
        text = f'name = "shop"\n[deploy]\n{deploy}\n[envs.production]\nservers = [{named}]\n{hosts}'
        (self.folder / "tako.toml").write_text(text + textwrap.dedent(more))

    def write(self, path: str, text: str) -> None:
        (self.folder / path).write_text(textwrap.dedent(text))

    def change(self) -> None:
        """Another tree, and so another release."""
        file = self.folder / "changes.txt"
        file.write_text(f"{len(file.read_text()) if file.exists() else 0}" * 3)
        with file.open("a") as out:
            out.write(os.urandom(8).hex())

    # --- the command ---

    @property
    def _env(self) -> dict[str, str]:
        own = {"TAKO_SSH": self.first.program, "XDG_CONFIG_HOME": str(self.folder.parent / "config")}
        return environment(**own, **({"PYTHONPATH": str(self.tako_from)} if self.tako_from else {}))

    def tako(self, *words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*TAKO, *words], cwd=self.folder, input=stdin, capture_output=True, text=True, check=False, timeout=400,
            env=self._env,
        )  # fmt: skip

    def begin(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*TAKO, *words], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=self._env, start_new_session=True,
        )  # fmt: skip

    def deploy(self, *words: str) -> list[dict[str, Any]]:
        """Deploy what has to be taken; how it went on each server."""
        done = self.tako("deploy", "--yes", "--json", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return list(json.loads(done.stdout)["servers"])

    def release(self) -> str:
        """Deploy a changed tree; its id."""
        self.change()
        return str(self.deploy()[0]["release"])

    # --- what is there ---

    @property
    def base(self) -> str:
        return "/opt/tako/shop" if self.user == "root" else f"/home/{self.user}/.local/share/tako/shop"

    @property
    def data_dir(self) -> str:
        home = f"/home/{self.user}/.local/share/tako/production"
        return "/var/lib/tako/production" if self.user == "root" else home

    def current(self, server: Machine | None = None) -> str:
        return Path((server or self.first).run("readlink", f"{self.base}/current", user=self.user).strip()).name

    def units(self, server: Machine | None = None) -> dict[str, str]:
        """The state of each release's unit."""
        words = ["systemctl", *["--user"] * (self.user != "root"), "list-units", "--all", "--plain", "--no-legend"]
        said = (server or self.first).run(*words, "tako-shop@*", user=self.user)
        rows = [line.split() for line in said.splitlines()]
        return {row[0].removeprefix("tako-shop@").removesuffix(".service"): row[2] for row in rows}

    def python(self, code: str, *words: str, server: Machine | None = None) -> str:
        """What a piece of Python prints that runs there as the app does, with the current release's runtime."""
        as_app = [] if self.user != "root" else ["runuser", "-u", "tako", "--"]
        told = ["env", "TAKO_APP_NAME=shop", f"TAKO_DATA_DIR={self.data_dir}"]
        python = [f"{self.base}/current/.venv/bin/python", "-c", textwrap.dedent(code), *words]
        script = 'cd "$1" && shift && exec "$@"'
        where = server or self.first
        return where.run(*as_app, "sh", "-c", script, "sh", f"{self.base}/current", *told, *python, user=self.user)

    def start(self, workflow: str, server: Machine | None = None) -> str:
        """The id of a new run."""
        code = f"""
            from workflows.flows import {workflow}
            print({workflow}.enqueue_sync(None))
        """
        return self.python(code, server=server).strip()

    def run(self, run_id: str) -> dict[str, Any]:
        code = """
            import json, sys
            from tako_runtime import store
            from tako_runtime.control import Control
            print(json.dumps(Control(store.current()).show(sys.argv[1]), default=str))
        """
        return dict(json.loads(self.python(code, run_id)))

    def signal(self, name: str) -> None:
        self.python("import sys; from tako_runtime import signal_sync; signal_sync(sys.argv[1], 1)", name)

    def ended(self, run_id: str) -> Any:
        """What a run returned, once it has."""
        until(lambda: self.run(run_id)["status"] in ("succeeded", "dead", "cancelled"), 60)
        run = self.run(run_id)
        assert run["status"] == "succeeded", run
        return run["result"]

    def runs_on(self, release: str) -> None:
        """That release runs, alone, and takes work."""
        self.is_up(release, self.first)
        assert self.ended(self.start("greet")) == release

    def is_up(self, release: str, server: Machine) -> None:
        """That release runs there, alone."""
        assert self.current(server) == release
        until(lambda: {name for name, state in self.units(server).items() if state == "active"} == {release}, 60)


def stage(web: Machine, but: str) -> str:
    """How far the trial of another release than that is, read off the server's disk."""
    try:
        told = json.loads((web.root / "var/lib/tako/production/apps/shop/trial.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(told["stage"]) if told["release"] != but else ""


class Hammering:
    """Requests to the app on the server, from there."""

    def __init__(self, server: Machine, port: int, rate: int) -> None:
        import shlex

        words = ["python3", "-c", textwrap.dedent(HAMMER), str(port), str(rate)]
        self._process = subprocess.Popen(
            [*server.program.split(), "-o", "ControlPath=none", f"root@{server.name}", "--", shlex.join(words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def stop(self) -> dict[str, Any]:
        said, _ = self._process.communicate(timeout=60)
        return dict(json.loads(said))


@contextlib.contextmanager
def index(server: Machine, wheels: Path) -> Iterator[None]:
    """A package index for that server: what is in the folder, over HTTP, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="tako-index-", dir="/tmp") as place:
        for wheel in wheels.rglob("*.whl"):
            name = wheel.name.split("-")[0].lower().replace("_", "-").replace(".", "-")
            page = Path(place, "simple", name)
            page.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, page)
        for page in Path(place, "simple").iterdir():
            links = "".join(f'<a href="{wheel.name}">{wheel.name}</a>\n' for wheel in page.glob("*.whl"))
            (page / "index.html").write_text(links)

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *given: Any, **more: Any) -> None:
                super().__init__(*given, directory=place, **more)

            def log_message(self, *_: object) -> None: ...

        with http.server.ThreadingHTTPServer((server.gateway, 0), Quiet) as serving:
            threading.Thread(target=serving.serve_forever, daemon=True).start()
            url = f"http://{server.gateway}:{serving.server_address[1]}/simple"
            told = f"[global]\nindex-url = {url}\ntrusted-host = {server.gateway}\n"
            (server.root / "etc/pip.conf").write_text(told)
            yield
            serving.shutdown()
