-- What has ended, by group: each group keeps its ended runs for a time of its own, and finds the oldest at once.

DROP INDEX runs_finished;
CREATE INDEX runs_ended ON runs ("group", finished_at) WHERE finished_at IS NOT NULL;
