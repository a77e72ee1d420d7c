"""What a server is asked before anything is changed there: this file alone, run by its own Python, prints it as JSON.

    python3 - SLUG APP ENV DATA_DIR < asked.py

Nothing but the standard library, and nothing is written. `facts.py` reads the answer.
"""

import fcntl
import json
import os
import platform
import pwd
import shutil
import subprocess
import sys
import time


def said(*words: str) -> str:
    """What a program prints; "" where it is not there or fails."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def lock_of(path: str) -> "dict[str, object] | None":
    """Who deploys right now."""
    try:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return dict(json.loads(file.read() or "{}"))
    except (OSError, ValueError):
        pass
    return None


def schema_of(path: str) -> "int | None":
    """The version that a tako has to know to work with the app's own store; `store/version.py` has the rule. None where
    there is no store, or none that can be read."""
    try:
        import sqlite3

        if not os.path.exists(path):
            return None
        file = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        try:
            number = int(file.execute("PRAGMA user_version").fetchone()[0])
            if not file.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'store'").fetchone():
                return number
            return int(file.execute("SELECT serves FROM store").fetchone()[0])
        finally:
            file.close()
    except (ImportError, sqlite3.Error):
        return None


def releases_of(base: str) -> "list[dict[str, object]]":
    found = []
    folder = os.path.join(base, "releases")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        place = os.path.join(folder, name)
        try:
            with open(os.path.join(place, "RELEASE.json"), encoding="utf-8") as file:
                about = json.load(file)
        except (OSError, ValueError):
            continue
        ready = os.path.exists(os.path.join(place, ".venv", ".ready"))
        found.append({**about, "id": name, "ready": ready, "at": os.lstat(place).st_mtime})
    return found


def linked(path: str) -> str:
    """The release that a link names."""
    return os.path.basename(os.readlink(path)) if os.path.islink(path) else ""


def free_below(path: str) -> int:
    """The bytes that are free where this folder is or will be."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    seen = os.statvfs(path)
    return seen.f_bavail * seen.f_frsize


def main(slug: str, app: str, env: str, data_dir: str) -> None:
    me = pwd.getpwuid(os.getuid())
    root = me.pw_uid == 0
    share = os.path.join(me.pw_dir, ".local", "share", "tako")
    base = os.path.join("/opt/tako" if root else share, slug)
    stated = os.path.expanduser(data_dir) if data_dir else ("/var/lib/tako" if root else share)
    data = os.path.join(stated, env)
    app_dir = os.path.join(data, "apps", app)
    user = [] if root else ["--user"]
    if user:
        os.environ.setdefault("XDG_RUNTIME_DIR", f"/run/user/{me.pw_uid}")
    listed = said("systemctl", *user, "list-units", "--all", "--plain", "--no-legend", "--no-pager", f"tako-{slug}@*")
    version = said("systemctl", "--version").split()
    answer = {
        "python": [sys.executable, platform.python_version()],
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "systemd": version[1] if len(version) > 1 else "",
        "manager": said("systemctl", *user, "is-system-running") or said("systemctl", *user, "show", "-p", "Version"),
        "user": me.pw_name,
        "root": root,
        "runtime_dir": "/run" if root else os.environ.get("XDG_RUNTIME_DIR", ""),
        "linger": root or os.path.exists(f"/var/lib/systemd/linger/{me.pw_name}"),
        "account": said("id", "-u", "tako") != "",
        "base": base,
        "data_dir": data,
        "free": free_below(base),
        "free_data": free_below(app_dir),
        "time": time.time(),  # noqa: TID251 -- the server's clock is what is asked for
        "uv": shutil.which("uv") or shutil.which("uv", path=f"{me.pw_dir}/.local/bin:/usr/local/bin") or "",
        "lock": lock_of(os.path.join(base, "deploy.lock")),
        "schema": schema_of(os.path.join(app_dir, "runs.db")),
        "current": linked(os.path.join(base, "current")),
        "previous": linked(os.path.join(base, "previous")),
        "units": {line.split()[0]: line.split()[2] for line in listed.splitlines() if len(line.split()) > 2},
        "releases": releases_of(base),
    }
    print(json.dumps(answer))


main(*sys.argv[1:5])
