"""The queries of `queries.sql` and the numbered migrations, read once."""

import re
from importlib import resources


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
