"""The queries of `queries.sql` and the numbered migrations, read once."""

import re
from collections.abc import Callable, Sequence
from importlib import resources

from tako_runtime.run import RUN_COLUMNS

#: What a claim makes of a run. An attempt that is open (the run was parked, or drained) goes on under its number; else
#: the next one begins.
_CLAIM = {
    "status": "'running'",
    "reason": "'claimed'",
    "worker": ":worker",
    "claim": "claim + 1",
    "attempt": "attempt + (CASE WHEN attempt_started_at IS NULL THEN 1 ELSE 0 END)",
    "attempt_started_at": "COALESCE(attempt_started_at, :now)",
    "started_at": "COALESCE(started_at, :now)",
}


def run_words(columns: Callable[[Sequence[str]], str]) -> dict[str, str]:
    """The words for runs, of a dialect that spells their `columns` so: `{run}` as it is, `{claimed}` as a claim makes
    it (one that may be claimed has no result), and `{claim}` for making it that."""
    claimed = {**_CLAIM, "result": "NULL"}
    return {
        "run": columns(RUN_COLUMNS),
        "claimed": ", ".join(claimed.get(name) or columns([name]) for name in RUN_COLUMNS),
        "claim": ", ".join(f"{name} = {value}" for name, value in _CLAIM.items()),
    }


def load(words: dict[str, str]) -> dict[str, str]:
    """The queries of `queries.sql` by name, with a dialect's `words` put in for `{word}`."""
    text = resources.files(__package__).joinpath("queries.sql").read_text("utf-8")
    found = re.findall(r"^-- name: (\w+)\n(.*?;)$", text, re.MULTILINE | re.DOTALL)
    queries = {}
    for name, body in found:
        lines = [line for line in body.splitlines() if not line.startswith("--")]
        query = " ".join(" ".join(lines).split()).rstrip(";")
        queries[name] = re.sub(r"\{(\w+)\}", lambda word: words[word[1]], query)
    return queries


def migrations(dialect: str) -> list[tuple[int, str]]:
    """The numbered steps that lead from an empty store to the current schema."""
    files = sorted(resources.files(__package__).joinpath("migrations", dialect).iterdir(), key=lambda file: file.name)
    return [(int(file.name[:4]), file.read_text("utf-8")) for file in files if file.name.endswith(".sql")]
