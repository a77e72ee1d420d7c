"""An app such as a user's: answers `/` with what it knows of itself and `/healthz` as the file `health` says, and does
what it finds in the file `do`. It listens on a descriptor (`--fd N`) or a port (`--port N`)."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tako_runtime import secrets

kind, number = sys.argv[1:3]
print("app is up", flush=True)  # noqa: T201
if Path("do").exists():
    what, _, words = Path("do").read_text().partition(" ")
    if what == "fail":
        sys.exit(words)
    if what == "start":
        child = subprocess.Popen(["sleep", "600"])
        Path("child").write_text(f"{child.pid}\n")
    if what == "ignore":
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/die":
            print("about to die", flush=True)  # noqa: T201
            os._exit(7)
        known = {
            "pid": os.getpid(), "pgid": os.getpgrp(), "ppid": os.getppid(), "argv": sys.argv, "env": dict(os.environ),
            "secrets": {name: secrets[name][:3] for name in secrets}, "cwd": str(Path.cwd()),
        }  # fmt: skip
        health = Path("health")
        status = int(health.read_text()) if self.path == "/healthz" and health.exists() else 200
        body = json.dumps(known).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


server = ThreadingHTTPServer(("127.0.0.1", int(number)), Handler, bind_and_activate=kind == "--port")
if kind == "--fd":
    server.socket.close()
    server.socket = socket.socket(fileno=int(number))
    server.server_address = server.socket.getsockname()
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    time.sleep(3600)
