-- What died lately, among however many runs have ended: only a run that dies has an entry to keep up.

CREATE INDEX runs_dead ON runs (finished_at) WHERE status = 'dead';
