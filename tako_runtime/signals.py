"""Signals that somebody waits for, and signals that nobody has waited for yet: side by side, a name that was mistyped
shows."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tako_runtime import clock, codec
from tako_runtime.store.base import KeptSignal, Wait

#: Among how many open waits the one is looked for that a kept signal was likely meant for.
AWAITED = 10_000

_NUMBER = re.compile(r"\d+")

#: How alike the words of two names must be, from 0 to 1.
_ALIKE = 0.75


def near_misses(kept: Iterable[str], awaited: Iterable[str]) -> Mapping[str, str]:
    """For each kept name that was likely meant for a wait on another, that other name.

    The numbers in both must be the same, since `order:41` is no slip of the hand for `order:42`; their words must be
    alike.

    >>> near_misses(["aproval:42", "approval:41", "Approval-42"], ["approval:42"])
    {'aproval:42': 'approval:42', 'Approval-42': 'approval:42'}
    """
    by_numbers: dict[tuple[str, ...], dict[str, str]] = {}
    for name in awaited:
        by_numbers.setdefault(tuple(_NUMBER.findall(name)), {})[name.casefold()] = name
    found = {}
    for name in kept:
        candidates = by_numbers.get(tuple(_NUMBER.findall(name)), {})
        near = difflib.get_close_matches(name.casefold(), candidates, n=1, cutoff=_ALIKE)
        if near and candidates[near[0]] != name:
            found[name] = candidates[near[0]]
    return found


def signals(waits: Sequence[tuple[Wait, bool]], kept: Sequence[KeptSignal], limit: int) -> dict[str, Any]:
    """For programs: at most `limit` of each; a wait says whether its run is local, and a kept signal has as `near` the
    wait that it was likely meant for."""
    near = near_misses({one.name for one in kept}, {wait.signal for wait, _ in waits})
    return {
        "waiting": [
            {
                "signal": wait.signal,
                "run": wait.run_id,
                "workflow": wait.workflow,
                "step": wait.step,
                "since": clock.iso(wait.since),
                "until": None if wait.deadline is None else clock.iso(wait.deadline),
                "local": local,
            }
            for wait, local in waits[:limit]
        ],
        "kept": [
            {
                "name": one.name,
                "payload": codec.shown(one.payload),
                "sent_at": clock.iso(one.sent_at),
                "expires_at": clock.iso(one.expires_at),
                "near": near.get(one.name),
            }
            for one in kept[:limit]
        ],
    }
