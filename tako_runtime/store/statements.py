"""What a dialect brings to the operations: the queries of `queries.sql`, carried out in the order in which they are
asked for, within the transaction that the dialect has begun."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from tako_runtime.store.base import Store

Bound = dict[str, Any]


class Statements(Store):
    """The primitives. A query is named; its parameters are given by name, or as rows for its `{rows}`."""

    def _value(self, query: str, bound: Bound) -> Any:
        """The first column of the first row, or None."""
        row = self._one(query, bound)
        return row[0] if row else None

    @abstractmethod
    def _all(self, query: str, bound: Bound | None = None) -> list[Any]:
        """The rows that a query of `queries.sql` gives."""

    @abstractmethod
    def _one(self, query: str, bound: Bound) -> Any:
        """Its first row, or None."""

    @abstractmethod
    def _change(self, query: str, bound: Bound) -> None:
        """Carry out a query that writes. Nobody waits for it: what comes of it is known by the commit."""

    @abstractmethod
    def _changed(self, query: str, bound: Bound) -> int:
        """The same; how many rows it has changed."""

    @abstractmethod
    def _write(self, query: str, written: Sequence[tuple[Any, ...]]) -> None:
        """Carry out a query with `{rows}` for all of these, many with one statement."""

    @abstractmethod
    def _all_written(self, query: str, written: Sequence[tuple[Any, ...]]) -> bool:
        """The same; whether each of them has changed its row."""

    @abstractmethod
    def _found(self, query: str, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The rows that a query with `{rows}` gives for all of these."""

    @abstractmethod
    def _command(self, text: str) -> None:
        """Carry out a statement that is no query."""

    @abstractmethod
    def _listed(self, values: Sequence[Any] | None) -> Any:
        """A list as a parameter."""

    @abstractmethod
    def _data_version(self) -> int: ...

    @abstractmethod
    def _give_back_space(self) -> bool: ...
