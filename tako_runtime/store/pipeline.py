"""Statements that travel together: sent in one go, and answered in their order.

This speaks libpq's pipeline protocol through psycopg's `pq`. psycopg's own pipeline goes to the socket at each
statement, which costs a batch several times the CPU, and its server as many wake-ups. What comes back is read by
psycopg's conversions.
"""

import re
import select
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import psycopg
from psycopg import errors, pq
from psycopg.adapt import Transformer

_INT8 = 20  # a number's type, as the database numbers types
_ANY = 0  # the server finds it out

#: Backslashes of JSON that the text of an array has not.
_ESCAPED = re.compile(rb'\\[^"\\]')


class Query(NamedTuple):
    """A statement, and the names of its parameters in the order of their numbers."""

    text: bytes
    names: tuple[str, ...] = ()


class Sent:
    """A statement on its way; its result, once that is here."""

    __slots__ = ("prepares", "result")

    def __init__(self, prepares: "tuple[bytes, tuple[int, ...]] | None" = None) -> None:
        self.prepares = prepares
        self.result: Any = None

    @property
    def status(self) -> str:
        """What it has done, in the server's word for that; nothing before its answer, or where it has failed."""
        return (self.result.command_status or b"").decode() if self.result is not None else ""


class Pipeline:
    """The pipeline of one connection, which nobody else uses within `with`. At its end all that was sent has been
    answered. `prepares` is False where a session is shared, and what one has prepared another one lacks."""

    def __init__(self, db: "psycopg.Connection[Any]", *, prepares: bool) -> None:
        self._wire, self._prepares = db.pgconn, prepares
        self._reader = Transformer(db)
        self._prepared: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self._names = 0
        self._waiting: deque[Sent] = deque()
        self._ready = select.poll()
        self._ready.register(self._wire.socket)
        self._flushed = True

    def __enter__(self) -> "Pipeline":
        """Raises where the connection has gone since: then nothing was sent."""
        while self._poll(select.POLLIN, 0):
            self._wire.consume_input()
        self._wire.enter_pipeline_mode()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._wire.status != pq.ConnStatus.OK:
            return
        try:
            self._wire.pipeline_sync()
            self._until(self._sent(Sent()), failed=kind is not None)
        finally:
            self._waiting.clear()
            if self._wire.status == pq.ConnStatus.OK:
                self._wire.exit_pipeline_mode()

    def send(self, query: Query, bound: Sequence[Any] = ()) -> Sent:
        """Put a statement on its way. Parameters are text, numbers, None, or lists of them."""
        kinds = tuple([_INT8 if isinstance(value, int) else _ANY for value in bound])
        given = [_written(value) for value in bound]
        if self._prepares:
            name = self._prepared.get((query.text, kinds)) or self._prepare(query.text, kinds)
            self._wire.send_query_prepared(name, given, result_format=pq.Format.BINARY)
        else:
            self._wire.send_query_params(query.text, given, kinds, result_format=pq.Format.BINARY)
        return self._sent(Sent())

    def command(self, text: bytes) -> Sent:
        """The same for what is no query."""
        self._wire.send_query_params(text, None)
        return self._sent(Sent())

    def _prepare(self, text: bytes, kinds: tuple[int, ...]) -> bytes:
        self._names += 1
        name = self._prepared[text, kinds] = b"tako_%d" % self._names
        self._wire.send_prepare(name, text, kinds)
        self._sent(Sent((text, kinds)))
        return name

    def _sent(self, sent: Sent) -> Sent:
        self._waiting.append(sent)
        self._flushed = False
        return sent

    def rows(self, sent: Sent) -> list[tuple[Any, ...]]:
        """The rows that a statement has answered."""
        result = self._answer(sent)
        self._reader.set_pgresult(result)
        return self._reader.load_rows(0, result.ntuples, tuple)

    def count(self, sent: Sent) -> int:
        """How many rows a statement has changed."""
        return self._answer(sent).command_tuples or 0

    def _answer(self, sent: Sent) -> Any:
        if sent.result is None:
            if not self._flushed:
                self._wire.send_flush_request()
                self._flushed = True
            self._until(sent)
        return sent.result

    # --- the wire ---

    def _until(self, last: Sent, *, failed: bool = False) -> None:
        """Read answers up to that one. Raises what the first statement says that has failed, unless one has before."""
        error: psycopg.Error | None = None
        while self._wire.flush():  # the server may wait for its answers to be taken before it takes more
            if self._poll(select.POLLIN | select.POLLOUT) & ~select.POLLOUT:
                self._wire.consume_input()
        while last.result is None:
            while self._wire.is_busy():
                self._poll(select.POLLIN)
                self._wire.consume_input()
            result = self._wire.get_result()
            if result is None:  # one comes after each statement's; and nothing but that, once the connection is gone
                if self._wire.status != pq.ConnStatus.OK:
                    raise error or psycopg.OperationalError(self._wire.get_error_message())
                continue
            sent = self._waiting.popleft()
            sent.result = result
            if result.status in (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.PIPELINE_ABORTED):
                if sent.prepares is not None:
                    self._prepared.pop(sent.prepares, None)
                error = error or self._error(result)
        if error is not None and not failed:
            raise error

    def _poll(self, wanted: int, timeout: int | None = None) -> int:
        """What the socket is ready for; waits for it, unless there is a `timeout` in milliseconds."""
        self._ready.modify(self._wire.socket, wanted)
        return sum(events for _, events in self._ready.poll(timeout))

    def _error(self, result: Any) -> psycopg.Error:
        if self._wire.status != pq.ConnStatus.OK:
            return psycopg.OperationalError(result.get_error_message())
        return errors.error_from_result(result)


def _written(value: Any) -> bytes | None:
    """A parameter as the database reads it. It has no room for NUL, which is shown as its symbol."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value.replace("\0", "\u2400") if "\0" in value else value).encode()
    if isinstance(value, int):
        return b"%d" % value
    return value if isinstance(value, bytes) else array(value)


def array(values: Sequence[Any]) -> bytes:
    """A list of texts or numbers as the database reads it: as JSON, in braces, but for a few characters."""
    written = msgspec.json.encode(values)
    if _ESCAPED.search(written):
        texts = ["NULL" if value is None else _quoted(value) for value in values]
        return f"{{{','.join(texts)}}}".encode()
    return b"{%b}" % written[1:-1]


def _quoted(text: str) -> str:
    return '"' + text.replace("\0", "\u2400").replace("\\", "\\\\").replace('"', '\\"') + '"'
