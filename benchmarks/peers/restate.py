"""Restate: a server of its own with a log, and services that it calls over HTTP/2; enqueued through its ingress."""

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import restate

from benchmarks.peer import Peer
from benchmarks.place import ROOT, installed
from benchmarks.told import BEGAN, ENDED, WOKE, tell
from benchmarks.work import Payload, async_body

SERVICE = "Bench"
SERVER = ROOT / ".bench" / "node" / "node_modules" / "@restatedev"

#: Requests in flight while many runs are sent.
TOGETHER = 64

service = restate.Service(SERVICE)


@service.handler("sequence")
async def sequence(ctx: restate.Context, given: Payload) -> None:
    tell(BEGAN, given["run"])
    for n in range(1, given["steps"] + 1):
        await ctx.run_typed(f"step-{n}", async_body, given=given, step=n)
    tell(ENDED, given["run"])


@service.handler("fanout")
async def fan_out(ctx: restate.Context, given: Payload) -> None:
    tell(BEGAN, given["run"])
    steps = [ctx.run_typed(f"step-{n}", async_body, given=given, step=n) for n in range(1, given["steps"] + 1)]
    await restate.gather(*steps)
    tell(ENDED, given["run"])


@service.handler("sleeper")
async def sleeper(ctx: restate.Context, given: Payload) -> None:
    tell(BEGAN, given["run"])
    now = await ctx.time()
    await ctx.sleep(timedelta(seconds=max(0.0, given["wake"] - now)))
    tell(WOKE, given["run"])


app = restate.app([service])


def _program() -> Path:
    for path in SERVER.glob("restate-server-*/bin/restate-server"):
        return path
    raise ImportError(f"no restate-server in {SERVER}: `make bench` installs it with npm")


class RestateServer(Peer):
    title = "Restate"
    module, distribution, store = "restate", "restate-sdk", "its own log (RocksDB)"
    settings: ClassVar = {
        "default": {"environment": {}},
        "tuned": {
            "environment": {
                "RESTATE_DEFAULT_NUM_PARTITIONS": "2",
                "RESTATE_WORKER__INVOKER__INACTIVITY_TIMEOUT": "500ms",
                "RESTATE_DEFAULT_RETRY_POLICY__INITIAL_INTERVAL": "50ms",
                "RESTATE_DEFAULT_RETRY_POLICY__MAX_INTERVAL": "200ms",
            }
        },
    }
    said: ClassVar = {
        "default": "as it comes: 24 partitions",
        "tuned": "2 partitions, parked after 0.5 s, a lost worker tried again after 50 to 200 ms",
    }
    best = 100
    asleep = 1_000
    drains: ClassVar = {1: 100, 10: 1_000, 100: 1_500}
    missing: ClassVar = {
        "history": "only its own log has its runs, and they end after a day: 1,000,000 would have to be run first",
    }

    def prepare(self) -> None:
        self.ingress_port, self.admin_port, node, self.port = _free_ports(4)
        data = self.place.folder / "restate"
        self.server = self.place.spawn(
            str(_program()), "--no-logo",
            RESTATE_BASE_DIR=str(data), RESTATE_DISABLE_TELEMETRY="true", RESTATE_LISTEN_MODE="tcp",
            RESTATE_BIND_IP="127.0.0.1", RESTATE_BIND_PORT=str(node), RESTATE_ADVERTISED_HOST="127.0.0.1",
            RESTATE_INGRESS__BIND_PORT=str(self.ingress_port), RESTATE_ADMIN__BIND_PORT=str(self.admin_port),
            RESTATE_ADMIN__DISABLE_WEB_UI="true",
            RESTATE_WORKER__INVOKER__CONCURRENT_INVOCATIONS_LIMIT=str(self.options["concurrency"]),
            **self.options["environment"],
        )  # fmt: skip
        self._working: subprocess.Popen[bytes] | None = None
        _until(self.server, lambda: self._ask(self.admin_port, "GET", "/health"))
        self.worker()
        deployment = json.dumps({"uri": f"http://127.0.0.1:{self.port}"})
        _until(self.server, lambda: self._ask(self.admin_port, "POST", "/deployments", deployment))
        _until(self.server, lambda: self._ask(self.ingress_port, "GET", "/restate/health"))
        assert self._working is not None
        self._working.kill()  # asked to leave, it waits for the server to hang up
        self._working.wait()

    def _ask(self, port: int, method: str, path: str, body: str | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status >= 300:
                raise OSError(f"{path}: {answer.status} {text[:300]!r}")

    def connect(self) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", self.ingress_port, timeout=30)

    def enqueue(self, workflow: str, given: Payload) -> None:
        headers = {"content-type": "application/json"}
        self.http.request("POST", f"/{SERVICE}/{workflow}/send", json.dumps(given), headers)
        answer = self.http.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise OSError(f"{answer.status} {text[:300]!r}")

    def enqueue_many(self, workflow: str, given: Sequence[Payload]) -> None:
        """It has no call for many: so many requests at a time."""
        asyncio.run(self._send(workflow, given, lambda: ""))

    def backlog(self, workflow: str, given: Sequence[Payload]) -> None:
        """Its server tries a worker that is away again with growing pauses, so a backlog cannot wait for one. Instead
        the worker is up, and all runs are due at one time.
        """
        self.worker()
        due = time.monotonic() + 2 + len(given) / 600
        asyncio.run(self._send(workflow, given, lambda: f"?delay={max(0, round((due - time.monotonic()) * 1000))}ms"))
        if time.monotonic() > due:
            raise TimeoutError("the runs were not all sent before they were due")

    async def _send(self, workflow: str, given: Sequence[Payload], query: object) -> None:
        waiting = list(reversed(given))

        async def send() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ingress_port)
            while waiting:
                body = json.dumps(waiting.pop()).encode()
                head = (
                    f"POST /{SERVICE}/{workflow}/send{query()} HTTP/1.1\r\nhost: bench\r\n"
                    f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                )
                writer.write(head.encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(answer.partition("content-length:")[2].split()[0]))
                if " 20" not in answer.partition("\r\n")[0]:
                    raise OSError(answer)
            writer.close()

        await asyncio.gather(*(send() for _ in range(min(TOGETHER, len(waiting)))))

    def worker(self) -> "subprocess.Popen[bytes]":
        if self._working is None or self._working.poll() is not None:
            self._working = self.place.spawn(
                installed("hypercorn"),
                "--bind", f"127.0.0.1:{self.port}", "--workers", "0", "benchmarks.peers.restate:app",
            )  # fmt: skip
        return self._working

    def servers(self) -> list[int]:
        return [self.server.pid]

    def close(self) -> None:
        self.http.close()


def _until(server: "subprocess.Popen[bytes]", ask: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except (OSError, http.client.HTTPException):
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
