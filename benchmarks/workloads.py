"""The workloads, each one a function of a peer at a new place. What it returns is numbers by name, or lists of them."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.flushes import counted
from benchmarks.measure import cpu_seconds, resident_mb
from benchmarks.peer import Peer
from benchmarks.place import stop
from benchmarks.told import BEGAN, ENDED, STEP, WOKE, Told
from benchmarks.work import FAN_OUT, SEQUENCE, SLEEPER, payload
from tako_runtime.clock import SystemClock

Found = dict[str, Any]

#: Seconds from the first enqueue of a run that sleeps until all of them wake: a shorter sleep is none to some engines.
PARKING = 40


def enqueue(peer: Peer, scale: float) -> Found:
    """One by one for a second or so, then many by the engine's call for many. No worker is up."""
    times = []
    until = time.perf_counter() + 1.5 * max(scale, 0.3)
    peer.enqueue(SEQUENCE, payload(0))
    while (began := time.perf_counter()) < until:
        peer.enqueue(SEQUENCE, payload(len(times)))
        times.append(time.perf_counter() - began)
    many = [payload(n) for n in range(round(5_000 * scale))]
    began = time.perf_counter()
    peer.enqueue_many(SEQUENCE, many)
    took = time.perf_counter() - began
    times.sort()
    return {
        "one by one, per s": len(times) / sum(times), "one, p50 ms": times[len(times) // 2] * 1e3,
        "many, per s": len(many) / took,
    }  # fmt: skip


def drain(peer: Peer, scale: float) -> Found:
    """Runs of three steps that are due, done by one worker; from the first one's first line to the last one's end."""
    concurrency = peer.options["concurrency"]
    runs = max(10, round(peer.drains[nearest(peer.drains, concurrency)] * scale))
    peer.backlog(SEQUENCE, [payload(n) for n in range(runs)])
    worker = peer.worker()
    told = _told(peer)
    ended = told.wait(ENDED, runs, 60, pause=0.02)
    began = min(one.at for one in told.of(BEGAN))
    cpu = cpu_seconds(worker.pid)
    _done_once(told, runs, 3)
    seconds = (max(one.at for one in ended) - began) / 1e9
    return {"runs per s": runs / seconds, "runs": runs, "worker's CPU us a run, with its start": cpu / runs * 1e6}


def latency(peer: Peer, scale: float) -> Found:
    """From the call of enqueue to the handler's first line, each one some time after the run before it ended. A worker
    that polls gets a pause as random as its last waits were long, so that no call is bound to its rhythm.
    """
    peer.worker()
    return {"ms": _latencies(peer, _told(peer), round(300 * scale), 10 * scale)}


def _latencies(peer: Peer, told: Told, count: int, seconds: float) -> list[float]:
    """At least 8, however long they take."""
    told.forget()
    warm = 20
    for n in range(warm):
        peer.enqueue(SEQUENCE, payload(n))
    told.wait(ENDED, warm, 60)
    found: list[float] = []
    until, longest = time.monotonic() + seconds, 0.02
    for n in range(warm, warm + count):
        time.sleep(random.uniform(0.005, longest))
        called = time.monotonic_ns()
        peer.enqueue(SEQUENCE, payload(n))
        told.wait(ENDED, n + 1, 30, pause=0.001)
        found.append((told.of(BEGAN, n)[0].at - called) / 1e6)
        longest = min(1.5, max(0.02, 1.5 * max(found[-5:]) / 1e3))
        if time.monotonic() > until and len(found) >= 8:
            break
    return found


def steps(peer: Peer, scale: float) -> Found:
    """One run of 1,000 steps, one after the other."""
    count = round(1_000 * scale)
    peer.worker()
    told = _told(peer)
    peer.enqueue(SEQUENCE, payload(0, steps=3))
    told.wait(ENDED, 1, 30)
    told.forget()
    peer.enqueue(SEQUENCE, payload(1, steps=count))
    told.wait(ENDED, 1, 60)
    began, ended = told.of(BEGAN, 1)[0], told.of(ENDED, 1)[0]
    _done_once(told, 1, count)
    return {"us a step": (ended.at - began.at) / 1e3 / count}


def fan_out(peer: Peer, scale: float) -> Found:
    """A run of 50 steps at once, from its first line to its end; one run after the other."""
    peer.worker()
    told = _told(peer)
    found = []
    for n in range(3 + max(3, round(20 * scale))):
        peer.enqueue(FAN_OUT, payload(n, steps=50))
        told.wait(ENDED, n + 1, 30)
        found.append((told.of(ENDED, n)[0].at - told.of(BEGAN, n)[0].at) / 1e6)
    return {"ms": found[3:]}


def wake(peer: Peer, scale: float) -> Found:
    """10,000 runs that sleep until one and the same time, or as many as the engine gets to sleep in 35 seconds: how
    late the handlers go on. Nobody has more than 500 of them waiting for a place to sleep.
    """
    most, step = round(10_000 * scale), 500
    peer.worker()
    due = SystemClock().now() / 1e6 + PARKING
    due_here = time.monotonic() + PARKING
    told, sent = _told(peer), 0
    while sent < most and time.monotonic() < due_here - 5:
        peer.enqueue_many(SLEEPER, [payload(n, wake=due) for n in range(sent, sent + step)])
        sent += step
        while len(told.of(BEGAN)) < sent - step and time.monotonic() < due_here - 5:
            time.sleep(0.02)
    time.sleep(max(0, due_here - time.monotonic() - 1))
    asleep = {one.run for one in told.of(BEGAN)}
    woke: dict[int, int] = {}

    def all_woke() -> bool:
        woke.update((one.run, one.at) for one in told.of(WOKE) if one.run in asleep)
        return len(woke) == len(asleep)

    time.sleep(max(0, due_here - time.monotonic()))
    _wait(all_woke, 60, 0.05)
    late = sorted(at / 1e6 - due_here * 1e3 for at in woke.values())
    if late[0] < -50:
        raise AssertionError(f"a run went on {-late[0]:.0f} ms before its time")
    return {"half of them, ms": late[len(late) // 2], "the last one, ms": late[-1], "runs": len(late)}


def kill(peer: Peer, scale: float) -> Found:
    """SIGKILL to the worker within step 2 of 3; until the run has ended. Who has no supervisor gets a new worker the
    moment the old one is gone, as from a process manager without a pause.
    """
    supervisor = peer.deployed(1)
    worker = None if supervisor else peer.worker()
    told = _told(peer)
    peer.enqueue(SEQUENCE, payload(0))
    told.wait(ENDED, 1, 30)
    peer.enqueue(SEQUENCE, payload(1, hold=str(peer.place.folder / "held")))
    _wait(lambda: [one for one in told.of(STEP, 1) if one.step == 2], 30)
    pid = worker.pid if worker else _worker_of(supervisor.pid)
    killed = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    if worker:
        worker.wait()
        peer.worker()
    _wait(lambda: told.of(ENDED, 1), 240)
    again = Counter(one.step for one in told.of(STEP, 1))
    return {
        "ms": (told.of(ENDED, 1)[0].at - killed) / 1e6,
        "step 1 was run": again[1], "step 2 was run": again[2], "step 3 was run": again[3],
    }  # fmt: skip


def cold(peer: Peer, scale: float) -> Found:
    """No worker is up. With a supervisor that starts one when work is due: from the call of enqueue; else a run is due,
    and the time is that from starting a worker; in both cases to the handler's first line.
    """
    supervisor = peer.deployed(0)
    told = _told(peer)
    if supervisor:
        time.sleep(3)  # so that it is up and at rest
        if _children(supervisor.pid):
            raise AssertionError("a worker is up before anything is due")
        began = time.monotonic_ns()
        peer.enqueue(SEQUENCE, payload(0))
    else:
        peer.enqueue(SEQUENCE, payload(0))
        began = time.monotonic_ns()
        peer.worker()
    _wait(lambda: told.of(BEGAN, 0), 60, 0.001)
    return {"ms": (told.of(BEGAN, 0)[0].at - began) / 1e6}


def imports(peer: Peer, scale: float) -> Found:
    """A process that imports what an application imports, less one that does nothing."""
    found = []
    for _ in range(max(3, round(7 * scale))):
        times = []
        for code in (f"import {peer.module}", "pass"):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - began)
        found.append((times[0] - times[1]) * 1e3)
    return {"ms": found}


def idle(peer: Peer, scale: float) -> Found:
    """A worker and the engine's servers that have done something, and have nothing to do. Shares of one core."""
    supervisor = peer.deployed(1)
    pids = [] if supervisor else [peer.worker().pid]
    told = _told(peer)
    peer.enqueue(SEQUENCE, payload(0))
    told.wait(ENDED, 1, 30)
    time.sleep(2)
    own = [supervisor.pid, *_children(supervisor.pid)] if supervisor else pids
    own += peer.servers()
    database = _database(peer)
    spent = {pid: cpu_seconds(pid) for pid in own + database}
    began = time.monotonic()
    time.sleep(max(2, 8 * scale))
    took = time.monotonic() - began

    def share(pids: list[int]) -> float:
        return sum(cpu_seconds(pid) - spent[pid] for pid in pids if _alive(pid)) / took * 100

    found = {"CPU %": share(own), "MB": sum(resident_mb(pid) for pid in own), "processes": len(own)}
    return found | ({"database's CPU %": share(database)} if database else {})


def flushes(peer: Peer, scale: float) -> Found:
    """How often the disk is told to keep what was written, from an enqueue to the end of its run of three steps: the
    calls of the enqueuer, the worker, and the engine's server or the database, one run at a time.
    """
    runs = 50
    worker = peer.worker()
    told = _told(peer)
    peer.enqueue(SEQUENCE, payload(0))
    told.wait(ENDED, 1, 30)
    database = _database(peer)
    with counted([os.getpid(), worker.pid, *peer.servers(), *database]) as count:
        until = time.monotonic() + 8
        for n in range(1, 1 + runs):
            peer.enqueue(SEQUENCE, payload(n))
            told.wait(ENDED, n + 1, 30, pause=0.001)
            if time.monotonic() > until:
                break
        time.sleep(0.3)
    return {"a run": count.total / n, "runs": n}


def history(peer: Peer, scale: float) -> Found:
    """The drain and the latency of a store with 1,000,000 ended runs, beside the same store before it had them.

    The engine runs 1,000 itself; those are copied, row for row with other keys (`multiply.py`).
    """
    runs = max(10, round(peer.drains[nearest(peer.drains, peer.options["concurrency"])] * 0.5))
    told = _told(peer)
    seed, found = 1_000, {}
    _ended(peer, told, seed)
    for when in ("before", "after"):
        if when == "after":
            began = time.monotonic()
            peer.multiply(round(1_000 * scale))
            os.sync()  # what the copying left to be written must not be in the way of what is measured
            found["seconds to copy"] = time.monotonic() - began
        for _ in range(2):
            found.setdefault(f"runs per s {when}", []).append(_ended(peer, told, runs))
        worker = peer.worker()
        found[f"ms {when}"] = _latencies(peer, told, 100, 5)
        stop(worker)
    return found | {"ended runs": seed * round(1_000 * scale)}


def _ended(peer: Peer, told: Told, runs: int) -> float:
    """So many runs that are due, done by a new worker, which is gone then; runs a second."""
    told.forget()
    peer.backlog(SEQUENCE, [payload(n) for n in range(runs)])
    worker = peer.worker()
    last = max(one.at for one in told.wait(ENDED, runs, 120, pause=0.02))
    first = min(one.at for one in told.of(BEGAN))
    time.sleep(0.3)  # until the last ones are written
    stop(worker)
    return runs / (last - first) * 1e9


WORKLOADS: dict[str, Callable[[Peer, float], Found]] = {
    "drain": drain, "latency": latency, "enqueue": enqueue, "steps": steps, "fan-out": fan_out, "kill": kill,
    "cold": cold, "idle": idle, "imports": imports, "flushes": flushes, "wake": wake, "history": history,
}  # fmt: skip


def nearest(sizes: dict[int, int], concurrency: int) -> int:
    return min(sizes, key=lambda one: abs(one - concurrency))


def _told(peer: Peer) -> Told:
    assert peer.place.told is not None
    return peer.place.told


def _done_once(told: Told, runs: int, each: int) -> None:
    """Every step of every run, and none twice."""
    done = Counter((one.run, one.step) for one in told.of(STEP))
    if len(done) != runs * each or set(done.values()) != {1}:
        twice = sum(count > 1 for count in done.values())
        raise AssertionError(f"of {runs * each} steps {len(done)} were run, {twice} of them more than once")


def _wait(true: Callable[[], object], seconds: float, pause: float = 0.005) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(pause)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
        return [int(each) for each in file.read().split()]


def _worker_of(supervisor: int) -> int:
    [worker] = _children(supervisor)
    return worker


def _database(peer: Peer) -> list[int]:
    """The processes of the Postgres that the peer's place is in."""
    if peer.store != "postgres":
        return []
    import psycopg

    with psycopg.connect(peer.place.url, autocommit=True) as db:
        postmaster = db.execute("SELECT pg_catalog.split_part(pg_read_file('postmaster.pid'), E'\\n', 1)").fetchone()
    assert postmaster is not None
    time.sleep(0.2)  # until the process that has answered is gone
    return _children(int(postmaster[0]))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
