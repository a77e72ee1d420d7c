"""Carries plans out: the one module that changes something on a server.

    take the lock of every server -> prepare all of them -> (somebody may be asked) -> switch, one after the other

Nothing that runs is touched until every server is prepared. A server that fails stops the others that have not begun,
unless told otherwise; those that have switched stay switched, and `--resume` does the rest.
"""

import contextlib
import getpass
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tako_cli.deploy.facts import locked
from tako_cli.deploy.plan import Plan, Step
from tako_cli.deploy.plan import lock as lock_words
from tako_cli.remote import CommandFailed, Remote
from tako_runtime import clock
from tako_runtime.errors import Refused, TakoError

#: How often the lock hears that we are there, in seconds. It gives us up after 30.
_BEAT = 5.0

#: Told of each step of each server: the server, what it does, and the seconds that it took, None while it is under way.
Tell = Callable[[str, str, float | None], None]


@dataclass(slots=True)
class Result:
    """How it went on one server: "taken", "failed" or "not tried"."""

    server: str
    release: str
    state: str = "not tried"
    error: str = ""
    hint: str = ""
    last_lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    before: str | None = None
    draining: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    unfit: Mapping[str, Any] | None = None


class Carrier:
    """One deploy to some servers."""

    def __init__(
        self, plans: Sequence[Plan], remotes: Mapping[str, Remote], tell: Tell, *, parallel: bool, keep_going: bool
    ) -> None:
        self._plans, self._remotes, self._tell = plans, remotes, tell
        self._parallel, self._keep_going = parallel, keep_going
        self.results = {plan.server: Result(plan.server, plan.release) for plan in plans}

    def carry_out(self, go_on: Callable[[Mapping[str, Mapping[str, Any]]], bool]) -> list[Result]:
        """All of it. `go_on` gets what is unfit on each server once all are prepared, and says whether to switch."""
        with contextlib.ExitStack() as locks:
            for plan in self._plans:
                locks.enter_context(locked_by_us(self._remotes[plan.server], plan))
            self._each(self._plans, self._prepare)
            ready = [plan for plan in self._plans if self.results[plan.server].state != "failed"]
            unfit = {one.server: one.unfit for one in self.results.values() if one.unfit is not None}
            if (self._keep_going or len(ready) == len(self._plans)) and go_on(unfit):
                self._each(ready, self._switch)
        return list(self.results.values())

    def _each(self, plans: Sequence[Plan], work: Callable[[Plan], None]) -> None:
        if self._parallel:
            with ThreadPoolExecutor(max(len(plans), 1)) as pool:
                list(pool.map(lambda plan: self._guarded(plan, work), plans))
            return
        for plan in plans:
            if not self._guarded(plan, work) and not self._keep_going:
                return

    def _guarded(self, plan: Plan, work: Callable[[Plan], None]) -> bool:
        result, begun = self.results[plan.server], time.monotonic()
        try:
            work(plan)
        except TakoError as error:
            result.state, result.error, result.hint = "failed", str(error), error.hint
            return False
        finally:
            result.seconds += time.monotonic() - begun
        return True

    def _prepare(self, plan: Plan) -> None:
        remote = self._remotes[plan.server]
        for step in plan.prepare:
            self._timed(plan, step, lambda step=step: self._do(remote, plan, step))  # type: ignore[misc]
        if plan.fit is not None:
            said = self._timed(plan, plan.fit, lambda: self._do(remote, plan, plan.fit))  # type: ignore[arg-type]
            self.results[plan.server].unfit = dict(json.loads(said))

    def _do(self, remote: Remote, plan: Plan, step: Step) -> str:
        """What the step has printed."""
        if step.file is not None:
            size = max(step.file.stat().st_size, 1)
            remote.upload(
                step.file, step.words[-1],
                lambda sent: self._tell(plan.server, f"{step.title}: {100 * sent // size} %", None),
            )  # fmt: skip
            return ""
        try:
            return remote.done(step.words, input=step.given)
        except CommandFailed as error:
            raise TakoError(f"{step.title}: {_last_words(error)}", hint=error.hint) from error

    def _switch(self, plan: Plan) -> None:
        result = self.results[plan.server]
        ended = self._timed(plan, plan.switch, lambda: self._switched(plan))
        result.state, result.before = "taken", ended["before"]
        result.draining, result.pruned = list(ended["draining"]), list(ended["pruned"])

    def _switched(self, plan: Plan) -> dict[str, Any]:
        """Listen to the switch until its end, which is its last line."""
        ended: dict[str, Any] = {}
        failed: CommandFailed | None = None
        try:
            for line in self._remotes[plan.server].lines(plan.switch.words, input=plan.switch.given):
                said = json.loads(line)
                if "stage" in said:
                    self._tell(plan.server, said["stage"], None)
                else:
                    ended = said
        except CommandFailed as error:
            failed = error
        if not ended and failed is not None:
            raise failed
        if not ended.get("taken"):
            self.results[plan.server].last_lines = list(ended.get("last_lines", ()))
            why = str(ended.get("error") or "the switch ended without a word")
            raise Refused(why, hint="The release is not taken; what ran before runs on.")
        return ended

    def _timed(self, plan: Plan, step: Step, work: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        self._tell(plan.server, step.title, None)
        done = work()
        self._tell(plan.server, step.title, time.monotonic() - begun)
        return done


@contextlib.contextmanager
def locked_by_us(remote: Remote, plan: Plan) -> Iterator[None]:
    """Nobody else deploys this app to that server, within. The lock is held there by a process that goes when we do,
    however we end. Raises `Refused`, naming who has it."""
    who = {"user": getpass.getuser(), "host": socket.gethostname(), "since": clock.SystemClock().now() / clock.SECOND}
    holder = remote.held_open(lock_words(plan.place, who))
    assert holder.stdout is not None
    assert holder.stdin is not None
    over = threading.Event()
    try:
        said = holder.stdout.readline().decode(errors="replace").strip()
        if said != "held":
            _refuse(remote, holder, said)
        beat = threading.Thread(target=_beat, args=(holder, over), daemon=True)
        beat.start()
        yield
    finally:
        over.set()
        holder.kill()
        holder.wait()
        for pipe in (holder.stdin, holder.stdout, holder.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _refuse(remote: Remote, holder: "subprocess.Popen[bytes]", said: str) -> None:
    try:
        who = json.loads(said)
    except ValueError:
        err = holder.stderr.read().decode(errors="replace").strip() if holder.stderr else ""
        remote.connect()  # says so if it is the connection
        raise Refused(f"{remote.name}: its lock cannot be taken: {err or said or 'no answer'}") from None
    now = clock.SystemClock().now() / clock.SECOND
    raise Refused(
        f"{remote.name}: {locked(who, now)}",
        hint="Wait for it to end. A deploy that was killed lets go within a minute.",
    )


def _beat(holder: "subprocess.Popen[bytes]", over: threading.Event) -> None:
    assert holder.stdin is not None
    while not over.wait(_BEAT):
        try:
            holder.stdin.write(b".")
            holder.stdin.flush()
        except (OSError, ValueError):
            return


def _last_words(error: CommandFailed) -> str:
    lines: Iterable[str] = (error.done.err.strip() or error.done.out.strip()).splitlines()[-30:]
    return "\n".join(lines) or f"ended with {error.done.code}"
