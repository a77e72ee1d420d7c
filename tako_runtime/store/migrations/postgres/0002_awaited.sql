-- Runs for whose end somebody waits on one machine or another. Where nobody does, an end rings no bell but its own's.

CREATE TABLE awaited (
    run BIGINT PRIMARY KEY
);
