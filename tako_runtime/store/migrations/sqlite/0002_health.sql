-- Groups whose workers cannot work, as the supervisor of each host sees it.

CREATE TABLE unhealthy (
    "group" TEXT NOT NULL,
    host    TEXT NOT NULL,
    since   INTEGER NOT NULL,
    reason  TEXT NOT NULL,                       -- one sentence
    details TEXT NOT NULL,                       -- the last lines that a worker of the group said
    PRIMARY KEY ("group", host)
) STRICT, WITHOUT ROWID;
