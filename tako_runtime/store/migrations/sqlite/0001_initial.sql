-- Runs, what they did, and what they wait for. Instants are microseconds since 1970 UTC; values are JSON text.

CREATE TABLE runs (
    seq                INTEGER PRIMARY KEY,      -- order of insertion
    id                 TEXT NOT NULL UNIQUE,     -- UUIDv7
    workflow           TEXT NOT NULL,
    "group"            TEXT NOT NULL,
    status             TEXT NOT NULL CHECK (status IN ('pending', 'running', 'succeeded', 'cancelled', 'dead')),
    reason             TEXT NOT NULL,
    priority           INTEGER NOT NULL,
    due_at             INTEGER,                  -- pending: NULL while it waits for a signal without a deadline
    attempt            INTEGER NOT NULL DEFAULT 0,
    max_attempts       INTEGER NOT NULL,
    retries            INTEGER NOT NULL,
    backoff_base       INTEGER NOT NULL,
    backoff_max        INTEGER NOT NULL,
    claim              INTEGER NOT NULL DEFAULT 0,
    worker             TEXT,
    losses             INTEGER NOT NULL DEFAULT 0,
    cancelling         TEXT,
    created_at         INTEGER NOT NULL,
    started_at         INTEGER,
    attempt_started_at INTEGER,
    finished_at        INTEGER,
    scheduled_at       INTEGER,                  -- the time that a schedule fired it for
    unique_key         TEXT,
    release            TEXT NOT NULL,
    payload            TEXT NOT NULL,
    result             TEXT,
    error              TEXT,
    ready              INTEGER                   -- 1: may be claimed; 0: pending, parked or due later; NULL: not pending
) STRICT;

-- A claim walks this one and nothing else is in it: what is parked or due later comes in when it becomes due.
CREATE INDEX runs_ready ON runs ("group", priority DESC, due_at, seq) WHERE ready = 1;
CREATE INDEX runs_later ON runs (due_at) WHERE ready = 0 AND due_at IS NOT NULL;
CREATE INDEX runs_in_hand ON runs (worker) WHERE status = 'running';
CREATE UNIQUE INDEX runs_unique_key ON runs (workflow, unique_key) WHERE unique_key IS NOT NULL AND finished_at IS NULL;
CREATE INDEX runs_finished ON runs (finished_at) WHERE finished_at IS NOT NULL;
-- For lists. Most ended runs succeeded: a list of those walks the ids.
CREATE INDEX runs_by_status ON runs (status, id) WHERE status <> 'succeeded';
CREATE INDEX runs_by_workflow ON runs (workflow, id);
-- A workflow's few unlucky runs among its many: nothing to keep up for a run that succeeds.
CREATE INDEX runs_unlucky ON runs (workflow, status, id) WHERE status IN ('dead', 'cancelled');

CREATE TABLE steps (
    run         INTEGER NOT NULL,
    kind        TEXT NOT NULL,
    name        TEXT NOT NULL,
    position    INTEGER NOT NULL,
    status      TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    started_at  INTEGER NOT NULL,
    finished_at INTEGER,
    due_at      INTEGER,                         -- a sleep's end, a wait's deadline
    result      TEXT,
    error       TEXT,
    rerun       INTEGER NOT NULL DEFAULT 0,      -- a failed step that the next attempt runs again
    PRIMARY KEY (run, kind, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE attempts (
    run         INTEGER NOT NULL,
    n           INTEGER NOT NULL,
    worker      TEXT,
    started_at  INTEGER NOT NULL,
    finished_at INTEGER NOT NULL,
    outcome     TEXT NOT NULL,
    error       TEXT,
    PRIMARY KEY (run, n)
) STRICT, WITHOUT ROWID;

CREATE TABLE waits (
    signal   TEXT NOT NULL,
    run      INTEGER NOT NULL,
    step     TEXT NOT NULL,
    position INTEGER NOT NULL,
    since    INTEGER NOT NULL,
    deadline INTEGER,
    PRIMARY KEY (signal, run, step)
) STRICT, WITHOUT ROWID;
CREATE INDEX waits_by_run ON waits (run);

CREATE TABLE signals (
    seq        INTEGER PRIMARY KEY,              -- kept signals are taken in this order
    name       TEXT NOT NULL,
    payload    TEXT NOT NULL,
    sent_at    INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT;
CREATE INDEX signals_by_name ON signals (name, seq);
CREATE INDEX signals_by_expiry ON signals (expires_at);

CREATE TABLE workers (
    id          TEXT PRIMARY KEY,
    "group"     TEXT NOT NULL,
    host        TEXT NOT NULL,
    pid         INTEGER NOT NULL,
    release     TEXT NOT NULL,
    started_at  INTEGER NOT NULL,
    lease_until INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE schedules (
    workflow   TEXT PRIMARY KEY,
    "group"    TEXT NOT NULL,
    expression TEXT NOT NULL,
    timezone   TEXT NOT NULL,
    catchup    TEXT NOT NULL,
    overlap    TEXT NOT NULL,
    next_at    INTEGER,
    last_at    INTEGER,
    last_run   TEXT
) STRICT, WITHOUT ROWID;

CREATE TABLE leases (
    name   TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    until  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
