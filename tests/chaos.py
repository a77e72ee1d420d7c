"""A night of crashes: `make chaos`.

Thousands of runs of all kinds are enqueued and worked off, while the supervisor, its workers and the enqueuers are
killed, and stopped for longer than a lease, at random. Whatever was killed is started again, as systemd would. In the
end: every acknowledged run has ended exactly once, a step that was saved has not run again, no signal is lost, no time
of a schedule has fired twice, the store is sound. `tests/test_chaos.py` runs a short form.

With `--servers 3` there are three of everything, with data folders of their own, on one Postgres that is restarted at
random too: as a crash is, and in order.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import psycopg
from postgres import Server, server

from tako_runtime import store
from tako_runtime.store import Home

PROJECT = Path(__file__).parent / "scenarios" / "chaos"

#: Seconds without any progress, after which it is given up.
PATIENCE = 60.0

#: How long a stopped process stays stopped, in seconds: shorter and longer than a lease.
STOPPED = (0.05, 3.5)


class Broken(AssertionError):
    """Something does not hold that always holds."""


@dataclass
class Night:
    """What there is while it lasts."""

    root: Path
    runs: int
    strikes: int
    chance: random.Random
    database: Server | None = None
    servers: int = 1
    enqueuers: int = 2
    struck: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        url = self.database.database() if self.database else store.EMBEDDED
        self.homes = [Home("chaos", self.root / f"data-{n}", url, store.PRODUCTION) for n in range(self.servers)]
        self.book, self.bodies, self.log = (self.root / name for name in ("book", "bodies", "log"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: dict[int, float] = {}
        shutil.copytree(PROJECT, self.root / "project")
        with (self.root / "project" / "tako.toml").open("a") as file:
            file.write(f'\n[storage]\nurl = "{url}"\n')

    # --- processes ---

    def _words(self) -> dict[str, tuple[Home, list[str]]]:
        enqueue = [sys.executable, "enqueue.py"]
        numbers = [[str(n), str(self.enqueuers), str(self.runs), f"{self.book}-{n}"] for n in range(self.enqueuers)]
        serve = [sys.executable, "-m", "tako_runtime", "serve", "--log-level", "debug"]
        supervisors = {f"supervisor {n}": (home, serve) for n, home in enumerate(self.homes)}
        enqueuers = {f"enqueuer {n}": (self.homes[n % self.servers], enqueue + own) for n, own in enumerate(numbers)}
        return supervisors | enqueuers

    def keep_up(self) -> None:
        """Start what has not been started, and what was killed; let go on what was stopped for long enough."""
        for name, (home, words) in self._words().items():
            process = self._processes.get(name)
            if process is None or (process.poll() is not None and process.returncode != 0):
                may_end = (-signal.SIGKILL, 0, 1) if self.database else (-signal.SIGKILL, 0)  # 1: no database
                if process is not None and process.returncode not in may_end:
                    raise Broken(f"the {name} ended with {process.returncode}: {self.log.read_text()[-4_000:]}")
                environment = {**os.environ, **home.environment(), "CHAOS_BODIES": str(self.bodies)}
                with self.log.open("ab") as log:
                    self._processes[name] = subprocess.Popen(
                        words, cwd=self.root / "project", env=environment, stdin=subprocess.DEVNULL, stdout=log,
                        stderr=log,
                    )  # fmt: skip
        for pid, until in list(self._stopped.items()):
            if time.monotonic() >= until:
                del self._stopped[pid]
                _send(pid, signal.SIGCONT)

    def strike(self) -> None:
        """Kill somebody, or stop him for a while."""
        if self.database and self.chance.random() < 0.2:
            self.database.restart(how := self.chance.choice(["immediate", "fast"]))
            self.struck[f"database restarted ({how})"] += 1
            return
        workers = [pid for (pid,) in self.ask("SELECT pid FROM workers")]
        alive = {name: process.pid for name, process in self._processes.items() if process.poll() is None}
        victims = [("worker", pid) for pid in workers] + [(name.split()[0], pid) for name, pid in alive.items()]
        kind, pid = self.chance.choice(victims)
        if self.chance.random() < 0.6:
            _send(pid, signal.SIGKILL)
            self.struck[f"{kind} killed"] += 1
        else:
            _send(pid, signal.SIGSTOP)
            self._stopped[pid] = time.monotonic() + self.chance.uniform(*STOPPED)
            self.struck[f"{kind} stopped"] += 1

    def end(self) -> None:
        """Stop the supervisor in order; nobody is left."""
        for pid in self._stopped:
            _send(pid, signal.SIGCONT)
        supervisors = [process for name, process in self._processes.items() if name.startswith("supervisor")]
        for supervisor in supervisors:
            supervisor.terminate()
        for supervisor in supervisors:
            if (code := supervisor.wait(30)) not in (0, -signal.SIGTERM):  # one had only just been started again
                raise Broken(f"a supervisor ended with {code}: {self.log.read_text()[-4_000:]}")

    def clear(self) -> None:
        """Whatever has failed, nothing outlives it."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    # --- what is there ---

    def ask(self, query: str) -> list[Any]:
        if self.database:
            try:
                with psycopg.connect(self.homes[0].url, options=f"-c search_path={self.homes[0].schema}") as shared:
                    return shared.execute(query).fetchall()
            except psycopg.errors.UndefinedTable:
                return []
        path = self.homes[0].app_dir / "runs.db"
        if not path.exists():
            return []
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            db.set_busy_timeout(30_000)
            return db.execute(query).fetchall()
        except apsw.SQLError:  # the file is there, its tables are not yet
            return []
        finally:
            db.close()

    def noted(self, kind: str) -> list[list[str]]:
        """What the enqueuers have written down: only whole lines were acknowledged."""
        books = [Path(f"{self.book}-{n}") for n in range(self.enqueuers)]
        lines = [line for book in books if book.exists() for line in book.read_text().split("\n")[:-1]]
        return [words[1:] for line in lines if (words := line.split()) and words[0] == kind]

    def live_through(self) -> None:
        """Until every acknowledged run has ended. The strikes come as the work goes on, not by the clock."""
        moved_at, before, struck = time.monotonic(), (-1, -1), 0
        while True:
            self.keep_up()
            acknowledged = self.noted("run")
            [[ended]] = self.ask(
                "SELECT count(*) FROM runs WHERE finished_at IS NOT NULL AND scheduled_at IS NULL"
            ) or [[0]]
            if (now := (len(acknowledged), ended)) != before:
                moved_at, before = time.monotonic(), now
            if struck < self.strikes and sum(now) * self.strikes >= 2 * self.runs * struck:
                self.strike()
                struck += 1
            elif len(acknowledged) == self.runs and not self._left(acknowledged):
                return
            elif time.monotonic() - moved_at > PATIENCE:
                raise Broken(f"nothing has moved for {PATIENCE:g} s; left: {self._left(acknowledged)[:5]}")
            time.sleep(0.02)

    def _left(self, acknowledged: list[list[str]]) -> list[str]:
        live = {run_id for (run_id,) in self.ask("SELECT id FROM runs WHERE finished_at IS NULL")}
        return [run_id for _, run_id in acknowledged if run_id in live]

    # --- what holds ---

    def check(self) -> None:
        runs = {row[0]: row[1:] for row in self.ask("SELECT id, seq, workflow, status, result, reason FROM runs")}
        acknowledged = {run_id: n for n, run_id in self.noted("run")}
        for run_id, n in acknowledged.items():
            if run_id not in runs:
                raise Broken(f"run {run_id} was acknowledged and is not there")
            if runs[run_id][2:4] != ("succeeded", n):
                raise Broken(f"run {run_id} of number {n} is {runs[run_id]}")
        ends = Counter(run for (run,) in self.ask("SELECT run FROM attempts WHERE outcome = 'succeeded'"))
        wrong = [run for run, count in ends.items() if count != 1]
        missing = [run_id for run_id in acknowledged if ends[runs[run_id][0]] != 1]
        if wrong or missing:
            raise Broken(f"runs that ended more or less than once: {wrong[:5]} {missing[:5]}")
        self._check_steps()
        times = Counter(at for (at,) in self.ask("SELECT scheduled_at FROM runs WHERE scheduled_at IS NOT NULL"))
        if doubled := [at for at, count in times.items() if count > 1]:
            raise Broken(f"fired twice: {doubled}")
        if not times:
            raise Broken("the schedule has never fired")
        if waits := self.ask("SELECT * FROM waits"):
            raise Broken(f"somebody still waits: {waits[:5]}")
        if not self.database and (sound := self.ask("PRAGMA integrity_check")) != [("ok",)]:
            raise Broken(f"the store is damaged: {sound}")

    def _check_steps(self) -> None:
        """What is stored is what one time of the body returned; and no time began after that was stored."""
        times: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for line in self.bodies.read_text().split("\n")[:-1]:
            run_id, name, this_time, began = line.split()
            times[run_id, name][this_time] = int(began)
        saved = self.ask(
            "SELECT runs.id, steps.name, steps.result, steps.finished_at FROM steps JOIN runs ON runs.seq = steps.run "
            "WHERE steps.kind = 'run' AND steps.status = 'done'"
        )
        for run_id, name, result, finished_at in saved:
            began = times[run_id, name]
            if result.strip('"') not in began:
                raise Broken(f"step {name} of {run_id} has a result that none of its bodies returned")
            if late := [this_time for this_time, at in began.items() if at > finished_at]:
                raise Broken(f"step {name} of {run_id} ran again after it was saved: {late}")

    def told(self) -> str:
        struck = ", ".join(f"{what} {count}" for what, count in sorted(self.struck.items()))
        attempts = Counter(outcome for (outcome,) in self.ask("SELECT outcome FROM attempts"))
        used = ", ".join(f"{outcome} {count}" for outcome, count in sorted(attempts.items()))
        return f"runs {len(self.noted('run'))}; attempts: {used}; struck: {struck}"


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


def night(runs: int, strikes: int, seed: int, database: Server | None = None, servers: int = 1) -> str:
    """Live through one; what happened. Raises `Broken`, and keeps what is there, if something does not hold."""
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    one = Night(root, runs, strikes, random.Random(seed), database, servers, enqueuers=max(2, servers))
    try:
        one.live_through()
        one.end()
        one.check()
    except BaseException:
        print(f"seed {seed}; {one.told()}\nkept in {root}", file=sys.stderr)
        raise
    finally:
        one.clear()
    told = one.told()
    shutil.rmtree(root)
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--strikes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--servers", type=int, default=1, help="more than one: on a Postgres of their own")
    args = parser.parse_args()
    with server() if args.servers > 1 else contextlib.nullcontext() as shared:
        print(f"seed {args.seed}: {night(args.runs, args.strikes, args.seed, shared, args.servers)}")
