"""The database of a shared store: its url, connections to it, and what can go wrong with them.

The url is a secret. Nothing here shows it: what people are told is the host, the port and the database's name.
"""

import logging
from typing import Any

import psycopg
from psycopg import conninfo, errors, pq
from psycopg.types.string import StrDumperUnknown

from tako_runtime import clock
from tako_runtime.errors import ConfigError, Refused, StoreBusy, StoreError, StoreUnreachable
from tako_runtime.log import emit

#: What a connection is told unless its url says otherwise. A peer that is silent for about ten seconds is gone; of
#: several hosts (a primary and its standbys) it is the one that takes writes.
_DEFAULTS = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "target_session_attrs": "read-write",
    "application_name": "tako",
}

#: For a session, or where that is shared (behind a pooler) for each transaction. A client that has stopped in a
#: transaction lets go of its locks; nobody waits long for a lock or a statement. And each query is written for the
#: index that it walks: the planner, which goes by what a table was at its last ANALYZE, is to think of nothing better.
SETTINGS = {
    "idle_in_transaction_session_timeout": "5s",
    "lock_timeout": "10s",
    "statement_timeout": "30s",
    "jit": "off",
    "enable_seqscan": "off",
    "enable_sort": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}

#: Trouble of the database's that passes with time: no space, no memory, somebody's lock.
_PASSES = ("53", "55P03", "57014")

#: What says that this server takes no more writes of this connection, though it is there: another one may.
_GONE = (errors.AdminShutdown, errors.CrashShutdown, errors.CannotConnectNow, errors.ReadOnlySqlTransaction)

# It warns of a pipeline that ends with its connection, which is seen to here.
logging.getLogger("psycopg").setLevel(logging.ERROR)

#: Two transactions stood in each other's way, and this one was taken back: the same one lands when it is tried again.
AGAIN = (errors.DeadlockDetected, errors.SerializationFailure)

#: What no later try mends, in the words of a server that refuses a connection.
_FINAL = (
    "authentication failed",
    "does not exist",
    "pg_hba.conf",
    "no password supplied",
    "not permitted",
    "certificate",
)


class _Text(StrDumperUnknown):
    """Text that this database takes: it has no room for NUL, which is shown as its symbol."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", "\u2400") if "\0" in obj else obj)


class Database:
    """Where a store is, for whoever connects. `pooled` is known once somebody has connected: whether a pooler
    (pgbouncer) sits between, which hands one session to many clients, a transaction at a time."""

    def __init__(self, url: str, named: str) -> None:
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.Error:  # its text has parts of the url
            raise ConfigError(
                f"{named} cannot be read as postgresql://user:password@host:port/database",
                hint="It is not shown, for it may hold a password. Characters such as @ / # in one are written as %40.",
            ) from None
        self.pooled = False
        self._given = given
        self._parameters: dict[str, Any] = {**_DEFAULTS, **given}

    @property
    def where(self) -> str:
        """For people: the host, the port and the database."""
        told = {
            option.keyword.decode(): (option.val or option.compiled or b"").decode()
            for option in pq.Conninfo.get_defaults()
        }
        told |= {name: str(value) for name, value in self._parameters.items()}
        return f"{told['host'] or 'this machine'}:{told['port']}/{told['dbname'] or told['user']}"

    @property
    def plain(self) -> str:
        """What the database's own tools are told to connect, without the password."""
        return conninfo.make_conninfo(
            "", **{name: value for name, value in self._given.items() if "password" not in name}
        )

    def __repr__(self) -> str:
        return f"<database {self.where}>"

    def connect(self) -> "psycopg.Connection[tuple[Any, ...]]":
        """A connection in autocommit. Raises `psycopg.Error`."""
        db = psycopg.connect(**self._parameters, autocommit=True)
        try:
            asked = clock.machine()
            [pid, encoding, shown] = _first(
                db,
                "SELECT pg_backend_pid(), current_setting('server_encoding'), "
                "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS int8)",
            )
            self.compare(shown, asked)
            if encoding != "UTF8":
                raise StoreError(
                    f"the database {self.where} is encoded in {encoding}", hint="Make one with ENCODING 'UTF8'."
                )
            self.pooled = pid != db.info.backend_pid  # a pooler makes up the number that it tells its clients
            db.prepare_threshold = None  # what is worth it, `pipeline.py` prepares; psycopg would forget that, too
            db.adapters.register_dumper(str, _Text)
            if not self.pooled:
                given = list(SETTINGS), list(SETTINGS.values())
                db.execute("SELECT set_config(n, v, false) FROM unnest(%s::text[], %s::text[]) AS t (n, v)", given)
        except BaseException:
            db.close()
            raise
        return db

    def compare(self, shown: int, asked: int) -> None:
        """Heed what its clock has `shown` in an answer that has just come, to what was asked at `asked`."""
        if clock.standard.heed(shown, asked=asked, answered=clock.machine()):
            if ahead := clock.standard.ahead:
                direction = "behind" if ahead > 0 else "ahead of"
                emit("clock.off", off=clock.spell(abs(ahead)), direction=direction, database=self.where)
            else:
                emit("clock.right", database=self.where)

    def words(self, error: BaseException) -> str:
        """What an error says, in one line, without the password."""
        text = " ".join(str(error).split())
        password = str(self._parameters.get("password") or "")
        return text.replace(password, "[secret]") if password else text


def _first(db: "psycopg.Connection[tuple[Any, ...]]", query: str) -> tuple[Any, ...]:
    row = db.execute(query).fetchone()
    assert row is not None
    return row


# --- what can go wrong -----------------------------------------------------------------------------------------------


def lost(error: psycopg.Error, db: "psycopg.Connection[Any] | None") -> bool:
    """Whether it says that there is no connection, or none that takes writes: another one may do."""
    if db is None:
        return isinstance(error, psycopg.OperationalError) and not any(word in str(error) for word in _FINAL)
    return db.closed or isinstance(error, _GONE)


def translated(error: psycopg.Error, database: Database) -> StoreError | Refused:
    """A database's error as one of ours."""
    where, said = database.where, database.words(error)
    if isinstance(error, errors.UniqueViolation) and "runs_unique_key" in said:
        return Refused(
            "another live run of this workflow holds the same unique key",
            hint="Let that one end, or cancel it, before this one runs again.",
        )
    if isinstance(error, errors.InsufficientPrivilege):
        return StoreError(
            f"the database {where} does not let this user do that ({said})",
            hint="Its user needs CREATE on the database, or on the app's own schema.",
        )
    if (error.sqlstate or "").startswith(_PASSES):
        return StoreBusy(
            f"the database {where} cannot take it right now ({said})", hint="Nothing was stored. Try again."
        )
    if isinstance(error, psycopg.OperationalError) and not any(word in said for word in _FINAL):
        return StoreUnreachable(f"the database {where} cannot be reached ({said})")
    if isinstance(error, psycopg.OperationalError):
        return StoreError(
            f"the database {where} refuses the connection ({said})", hint="Look at the url: user, password, database."
        )
    return StoreError(f"the database {where} failed ({type(error).__name__}: {said})")
