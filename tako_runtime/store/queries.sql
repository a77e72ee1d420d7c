-- Every query of every store. `-- name:` begins one and names it; the comment below says what it is for. Parameters are
-- `:name`; `{word}` stands for what a dialect has to say: `{run}` and `{step}` for the columns as it reads them, `{rows}`
-- for many rows of parameters in one statement, `{in_runs}` for being one of a list, `{those} ... {end}` for being one of
-- what a query finds, which is asked once. Where processes write at the same time, `{lock}` passes over the rows that
-- another one has in hand, and `{hold}` keeps a row as it is until the commit. Loaded and translated once (`queries.py`).

-- ===== a run's life, in order ========================================================================================

-- name: holder_of_key
-- The live run that holds a unique key.
SELECT id FROM runs WHERE workflow = :workflow AND unique_key = :unique_key AND finished_at IS NULL;

-- name: insert_runs
WITH new (id, workflow, "group", payload, created_at, due_at, retries, backoff_base, backoff_max, priority, unique_key,
          release, scheduled_at, ready) AS ({rows})
INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, max_attempts, retries,
                  backoff_base, backoff_max, created_at, scheduled_at, unique_key, release, payload, ready)
SELECT id, workflow, "group", 'pending', 'queued', priority, due_at, retries + 1, retries,
       backoff_base, backoff_max, created_at, scheduled_at, unique_key, release, payload, ready
  FROM new;

-- name: promote
-- What has become due comes into the index that claims walk; some at a time, so that no one waits long for the lock.
UPDATE runs SET ready = 1
 WHERE seq {those} SELECT seq FROM runs
                     WHERE ready = 0 AND due_at IS NOT NULL AND due_at <= :now ORDER BY due_at LIMIT 1000 {lock} {end};

-- name: claimable
-- What a worker may claim, the first first, each as the claim makes it; nobody else can take them before the commit.
SELECT {claimed} FROM runs
 WHERE ready = 1 AND "group" = :group AND {any_index}workflow {in_workflows}
   AND EXISTS (SELECT 1 FROM workers WHERE id = :worker AND lease_until > 0)
   AND NOT EXISTS (SELECT 1 FROM leases WHERE name = :pause AND until > :now)
 ORDER BY priority DESC, due_at, seq LIMIT :limit {lock};

-- name: claim
UPDATE runs SET ready = NULL, {claim} WHERE seq {in_runs};

-- name: steps_of
-- Of several runs, in the order of their calls.
SELECT run, {step} FROM steps WHERE run {in_runs} ORDER BY run, position, started_at, kind, name;

-- name: step
SELECT {step} FROM steps WHERE run = :seq AND kind = :kind AND name = :name;

-- name: holds_claim
SELECT 1 FROM runs WHERE seq = :seq AND claim = :claim AND {any_index}status = 'running' {hold};

-- name: save_steps
-- The first write wins; a failure that the next attempt may mend counts as not written.
WITH new (seq, claim, kind, name, position, status, attempt, started_at, finished_at, due_at, result, error, rerun) AS ({rows})
INSERT INTO steps (run, kind, name, position, status, attempt, started_at, finished_at, due_at, result, error)
SELECT seq, kind, name, position, status, attempt, started_at, finished_at, due_at, {result}, error
  FROM new
 WHERE EXISTS (SELECT 1 FROM runs WHERE runs.seq = new.seq AND runs.claim = new.claim AND {any_index}runs.status = 'running'
               {hold})
    ON CONFLICT (run, kind, name) DO UPDATE
   SET position = excluded.position, status = excluded.status, attempt = excluded.attempt,
       started_at = excluded.started_at, finished_at = excluded.finished_at, due_at = excluded.due_at,
       result = excluded.result, error = excluded.error, rerun = 0
 WHERE steps.rerun = 1;

-- name: apply
-- One guarded write for every change: it lands only if the row is as the change saw it. `ready` is set where the run is to
-- go on, which a cancellation that came meanwhile forbids.
WITH change (status, reason, ready, due_at, worker, attempt_started_at, finished_at, losses, max_attempts, cancelling,
             result, error, seq, claim, seen_status) AS ({rows})
UPDATE runs
   SET status = change.status, reason = change.reason, ready = change.ready, due_at = change.due_at,
       worker = change.worker, attempt_started_at = change.attempt_started_at, finished_at = change.finished_at,
       losses = change.losses, max_attempts = change.max_attempts, cancelling = change.cancelling,
       result = change.result, error = change.error
  FROM change
 WHERE runs.seq = change.seq AND runs.claim = change.claim AND {any_index}runs.status = change.seen_status
   AND (change.ready IS NULL OR runs.cancelling IS NULL);

-- name: insert_attempts
INSERT INTO attempts (run, n, worker, started_at, finished_at, outcome, error)
{rows};

-- name: mark_rerun
UPDATE steps SET rerun = 1 WHERE run = :seq AND kind = :kind AND name = :name AND status = 'failed';

-- name: mark_all_rerun
UPDATE steps SET rerun = 1 WHERE run = :seq AND status = 'failed';

-- name: end_sleeps
UPDATE steps SET due_at = :now WHERE run = :seq AND kind = 'sleep' AND due_at > :now AND due_at <= :until;

-- name: drop_steps
DELETE FROM steps WHERE run = :seq AND position >= :drop_from;

-- name: drop_waits_from
DELETE FROM waits WHERE run = :seq AND position >= :drop_from;

-- name: drop_waits
DELETE FROM waits WHERE run {in_runs};

-- name: answered
-- Of the waits that runs were about to park on, the runs that have one which is open no more.
WITH parked (seq, name) AS ({rows})
SELECT DISTINCT seq FROM parked
 WHERE NOT EXISTS (SELECT 1 FROM waits WHERE waits.run = parked.seq AND waits.step = parked.name);

-- name: make_due
UPDATE runs SET ready = 1, reason = 'queued', due_at = :now WHERE seq {in_runs};

-- ===== waits and signals =============================================================================================

-- name: take_kept
-- The oldest kept signal of a name.
DELETE FROM signals
 WHERE seq = (SELECT seq FROM signals WHERE name = :signal AND expires_at > :now ORDER BY seq LIMIT 1)
RETURNING {payload};

-- name: insert_wait
INSERT INTO waits (signal, run, step, position, since, deadline)
VALUES (:signal, :seq, :name, :position, :started_at, :due_at) ON CONFLICT DO NOTHING;

-- name: end_wait
-- The step that waited has its answer.
UPDATE steps SET status = :status, finished_at = :now, result = :payload
 WHERE run = :seq AND kind = 'wait' AND name = :name AND status = 'waiting';

-- name: drop_wait
DELETE FROM waits WHERE run = :seq AND step = :name;

-- name: waiting_runs
-- One wait of every run that waits for the signal: the one that began first in the order of its calls.
SELECT run, step FROM waits AS w
 WHERE signal = :name AND (deadline IS NULL OR deadline > :now)
   AND NOT EXISTS (SELECT 1 FROM waits AS earlier
                    WHERE earlier.signal = w.signal AND earlier.run = w.run
                      AND (earlier.deadline IS NULL OR earlier.deadline > :now)
                      AND (earlier.position, earlier.step) < (w.position, w.step));

-- name: wake
-- A parked run takes its signal up now; one that waits for a retry keeps its pause.
UPDATE runs SET ready = 1, reason = 'queued', due_at = :now
 WHERE seq = :seq AND status = 'pending' AND reason = 'waiting'
RETURNING "group";

-- name: keep_signal
INSERT INTO signals (name, payload, sent_at, expires_at) VALUES (:name, :payload, :now, :expires_at);

-- name: drop_kept
DELETE FROM signals
 WHERE seq = (SELECT seq FROM signals WHERE name = :name AND sent_at = :sent_at ORDER BY seq LIMIT 1);

-- ===== workers =======================================================================================================

-- name: insert_worker
INSERT INTO workers (id, "group", host, pid, release, started_at, lease_until)
VALUES (:id, :group, :host, :pid, :release, :started_at, :lease_until);

-- name: renew_lease
UPDATE workers SET lease_until = :until WHERE id = :worker AND lease_until > 0;

-- name: give_up_worker
-- Compare and set: a worker that has renewed its lease since it was looked at is alive.
UPDATE workers SET lease_until = 0 WHERE id = :worker AND lease_until = :seen;

-- name: delete_worker
DELETE FROM workers WHERE id = :worker
   AND NOT EXISTS (SELECT 1 FROM runs WHERE status = 'running' AND worker = :worker);

-- name: worker_is_there
SELECT 1 FROM workers WHERE id = :worker;

-- name: list_workers
SELECT id, "group", host, pid, release, started_at, lease_until FROM workers ORDER BY started_at, id;

-- name: runs_of
SELECT {run} FROM runs WHERE status = 'running' AND worker = :worker;

-- name: report_unhealthy
INSERT INTO unhealthy ("group", host, since, reason, details) VALUES (:group, :host, :now, :reason, :details)
    ON CONFLICT ("group", host) DO UPDATE SET reason = excluded.reason, details = excluded.details;

-- name: report_healthy
DELETE FROM unhealthy WHERE "group" = :group AND host = :host;

-- name: list_health
SELECT "group", host, since, reason, details FROM unhealthy ORDER BY "group", host;

-- ===== leader, schedules, old runs ===================================================================================

-- name: take_lease
-- One that lies further ahead than anybody could take it now was taken by a clock that was ahead: it holds no longer.
INSERT INTO leases (name, holder, until) VALUES (:name, :holder, :until)
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
 WHERE leases.holder = :holder OR leases.until <= :now OR leases.until > :until + :until - :now
RETURNING 1;

-- name: drop_lease
DELETE FROM leases WHERE name = :name AND holder = :holder;

-- name: held_lease
SELECT holder, until FROM leases WHERE name = :name AND until > :now;

-- name: set_schedule
-- An edited schedule begins anew; one that is as it was keeps its place.
INSERT INTO schedules (workflow, "group", expression, timezone, catchup, overlap, next_at)
VALUES (:workflow, :group, :expression, :timezone, :catchup, :overlap, :next_at)
    ON CONFLICT (workflow) DO UPDATE
   SET "group" = excluded."group", catchup = excluded.catchup, overlap = excluded.overlap,
       next_at = CASE WHEN schedules.expression = excluded.expression AND schedules.timezone = excluded.timezone
                      THEN schedules.next_at ELSE excluded.next_at END,
       expression = excluded.expression, timezone = excluded.timezone;

-- name: delete_schedule
DELETE FROM schedules WHERE workflow = :workflow;

-- name: list_schedules
SELECT workflow, "group", expression, timezone, catchup, overlap, next_at, last_at, last_run,
       EXISTS (SELECT 1 FROM runs WHERE runs.id = schedules.last_run AND runs.finished_at IS NULL)
  FROM schedules ORDER BY workflow;

-- name: advance_schedule
UPDATE schedules SET next_at = :next_at, last_at = COALESCE(:fired_at, last_at), last_run = COALESCE(:run_id, last_run)
 WHERE workflow = :workflow AND (next_at = :seen_next_at OR (next_at IS NULL AND :seen_next_at IS NULL))
RETURNING 1;

-- name: next_ended_group
-- The first group after this one that has ended runs: asked again and again, it skips from group to group.
SELECT "group" FROM runs WHERE finished_at IS NOT NULL AND "group" > :after ORDER BY "group" LIMIT 1;

-- name: ended_runs
-- A stretch of a group's ended runs, in the order of their ends; which of them are asked for; and about the bytes that go
-- with each. The walk has an end, however few of them fit.
SELECT finished_at, seq,
       (workflow = :workflow OR :workflow IS NULL) AND (status {in_statuses} OR :statuses IS NULL),
       octet_length(payload) + COALESCE(octet_length(result), 0)
       + COALESCE((SELECT sum(200 + COALESCE(octet_length(s.result), 0)) FROM steps AS s WHERE s.run = runs.seq), 0)
  FROM runs
 WHERE finished_at IS NOT NULL AND "group" = :group AND (finished_at, seq) > (:after_at, :after_seq)
   AND finished_at < :before
 ORDER BY finished_at, seq LIMIT :limit {lock};

-- name: delete_runs
DELETE FROM runs WHERE seq {in_runs};

-- name: delete_steps
DELETE FROM steps WHERE run {in_runs};

-- name: delete_attempts
DELETE FROM attempts WHERE run {in_runs};

-- ===== what is there =================================================================================================

-- name: next_ready_group
-- The first group after this one that has a run to claim: asked again and again, it skips from group to group.
SELECT "group" FROM runs WHERE ready = 1 AND "group" > :after ORDER BY "group" LIMIT 1;

-- name: declared_is_ready
-- Whether a group has a run to claim whose workflow is one of these. In the order of a claim: the first will mostly do.
SELECT 1 FROM runs WHERE ready = 1 AND "group" = :group AND workflow {in_workflows}
 ORDER BY priority DESC, due_at, seq LIMIT 1;

-- name: first_ready
SELECT workflow FROM runs WHERE ready = 1 AND "group" = :group ORDER BY priority DESC, due_at, seq LIMIT 1;

-- name: next_due
SELECT due_at FROM runs WHERE ready = 0 AND due_at IS NOT NULL ORDER BY due_at LIMIT 1;

-- name: next_due_run
SELECT {run} FROM runs
 WHERE ready = 0 AND due_at IS NOT NULL AND (reason = :reason OR :reason IS NULL) ORDER BY due_at, seq LIMIT 1;

-- name: run_by_seq
SELECT {run} FROM runs WHERE seq = :seq;

-- name: find_runs
-- A range, so that the index on ids serves a prefix.
SELECT {run} FROM runs WHERE id >= :prefix AND id < :beyond ORDER BY id LIMIT :limit;

-- name: find_runs_by_end
-- Every id is looked at: it is a person who asks, of a run that has just been shown.
SELECT {run} FROM runs WHERE substr(id, length(id) - length(:ending) + 1) = :ending ORDER BY id DESC LIMIT :limit;

-- name: list_runs
SELECT {run} FROM runs WHERE id >= :since_id ORDER BY id DESC LIMIT :limit;

-- name: list_runs_by_workflow
SELECT {run} FROM runs WHERE workflow = :workflow AND id >= :since_id ORDER BY id DESC LIMIT :limit;

-- name: list_runs_by_status
SELECT {run} FROM runs WHERE status = :status AND status <> 'succeeded' AND id >= :since_id ORDER BY id DESC LIMIT :limit;

-- name: list_succeeded
-- Most ended runs have succeeded: the ids are walked, and nearly every one counts.
SELECT {run} FROM runs WHERE {any_index}status = 'succeeded' AND id >= :since_id ORDER BY id DESC LIMIT :limit;

-- name: list_unlucky_runs_by_workflow
SELECT {run} FROM runs
 WHERE workflow = :workflow AND status = :status AND status IN ('dead', 'cancelled') AND id >= :since_id
 ORDER BY id DESC LIMIT :limit;

-- name: list_runs_by_workflow_and_status
SELECT {run} FROM runs WHERE workflow = :workflow AND {any_index}status = :status AND id >= :since_id ORDER BY id DESC LIMIT :limit;

-- name: live_runs
-- In the order of the index: by ids alone, all that have ended would be walked over. From 'pending' on, there are only
-- 'running' and 'succeeded'.
SELECT seq, id, workflow, status FROM runs
 WHERE status <> 'succeeded' AND (status, id) > (:status, :after) ORDER BY status, id LIMIT :limit;

-- name: finished_of
-- The names of what several runs have finished, in the order of the calls.
SELECT run, name FROM steps
 WHERE run {in_runs} AND kind IN ('run', 'wait') AND status = 'done' ORDER BY run, position, name;

-- name: attempts_of
SELECT n, worker, started_at, finished_at, outcome, error FROM attempts WHERE run = :seq ORDER BY n;

-- name: waits_of
SELECT w.signal, r.id, w.step, w.since, w.deadline, r.workflow FROM waits AS w JOIN runs AS r ON r.seq = w.run
 WHERE w.run = :seq ORDER BY w.position, w.step;

-- name: all_waits
SELECT w.signal, r.id, w.step, w.since, w.deadline, r.workflow FROM waits AS w JOIN runs AS r ON r.seq = w.run
 ORDER BY w.signal, w.run, w.step LIMIT :limit;

-- name: kept_signals
SELECT name, {payload}, sent_at, expires_at FROM signals
 WHERE expires_at > :now AND (name = :name OR :name IS NULL) ORDER BY seq LIMIT :limit;

-- name: expire_signals
DELETE FROM signals
 WHERE seq {those} SELECT seq FROM signals WHERE expires_at <= :now ORDER BY expires_at LIMIT :limit {lock} {end};

-- name: count_live
SELECT 'pending', reason, count(*) FROM runs WHERE status = 'pending' AND status <> 'succeeded' GROUP BY reason
UNION ALL
SELECT 'running', reason, count(*) FROM runs WHERE status = 'running' AND status <> 'succeeded' GROUP BY reason;

-- name: count_ended
SELECT count(*) FROM runs
 WHERE finished_at IS NOT NULL AND "group" = :group AND finished_at >= :since AND finished_at < :before
   AND (workflow = :workflow OR :workflow IS NULL) AND (status {in_statuses} OR :statuses IS NULL);

-- name: count_dead
-- The few among the many: what an operator asks for all the time has an index of its own.
SELECT count(*) FROM runs WHERE status = 'dead' AND finished_at >= :since AND finished_at < :before;

-- name: count_kept
SELECT count(*) FROM signals WHERE expires_at > :now;

-- name: queues
-- Both halves: what a claim would walk, and what has become due since somebody last made that claimable.
SELECT "group", count(*), min(due_at) FROM runs WHERE ready = 1 GROUP BY "group"
UNION ALL
SELECT "group", count(*), min(due_at) FROM runs
 WHERE ready = 0 AND due_at IS NOT NULL AND due_at <= :now GROUP BY "group";

-- name: ready_ahead
-- Three ranges of the index that a claim walks: a higher priority, an older due time, an earlier insertion.
SELECT (SELECT count(*) FROM runs WHERE ready = 1 AND "group" = :group AND priority > :priority)
     + (SELECT count(*) FROM runs WHERE ready = 1 AND "group" = :group AND priority = :priority AND due_at < :due_at)
     + (SELECT count(*) FROM runs
         WHERE ready = 1 AND "group" = :group AND priority = :priority AND due_at = :due_at AND seq < :seq);

-- name: later_ahead
SELECT count(*) FROM runs
 WHERE ready = 0 AND due_at IS NOT NULL AND due_at <= :now AND "group" = :group
   AND (priority > :priority OR (priority = :priority AND (due_at, seq) < (:due_at, :seq)));

-- name: in_hand
SELECT worker, count(*) FROM runs WHERE status = 'running' GROUP BY worker;

-- name: look_over
-- From outside, at a store of whatever version: how many runs it has, and when the newest was made.
SELECT count(*), max(created_at) FROM runs;

-- ===== processes that write one store at the same time ===============================================================

-- name: lock_names
-- Held until the commit, in one order.
SELECT pg_advisory_xact_lock(CAST(:space AS int4), n) FROM unnest(CAST(:numbers AS int4[])) AS n;

-- name: set_for_now
-- For this transaction only, where a session is shared.
SELECT set_config(name, value, true) FROM unnest(CAST(:names AS text[]), CAST(:values AS text[])) AS t (name, value);

-- name: mark_batch
-- The number of the batch that this process writes, in the batch's own transaction; and what the clock shows there. Fails
-- where the batch was given up meanwhile (`give_up_batch`).
WITH marked AS (INSERT INTO writers (id, batch) VALUES (:writer, :batch)
    ON CONFLICT (id) DO UPDATE SET batch = excluded.batch, at = now() WHERE writers.batch < excluded.batch RETURNING id)
SELECT CASE count(*) WHEN 1 THEN CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS int8)
                     ELSE CAST('tako: its process has given this batch up, and done it again ' || count(*) AS int8) END
  FROM marked;

-- name: give_up_batch
-- It has been committed, or it never will be: where its transaction has come as far as its mark, it is waited for.
INSERT INTO writers (id, batch) VALUES (:writer, :given_up)
    ON CONFLICT (id) DO UPDATE SET batch = excluded.batch WHERE writers.batch < :batch;

-- name: last_batch
SELECT batch FROM writers WHERE id = :writer;

-- name: batches_of_others
SELECT CAST(COALESCE(sum(batch), 0) AS int8) FROM writers WHERE id <> :writer;

-- name: forget_writers
DELETE FROM writers WHERE at < now() - CAST(:age AS interval);

-- name: ring
-- In a transaction of its own, which does not wait for the disk: one that notifies holds a lock of the whole database's
-- until its commit is done.
SELECT set_config('synchronous_commit', 'off', true), pg_notify(:channel, :message);

-- name: await_end
-- Not where it has ended. It locks no run: a claim would pass over that one. Who asks looks at the run after this.
INSERT INTO awaited (run) SELECT seq FROM runs WHERE seq = :seq AND finished_at IS NULL ON CONFLICT DO NOTHING;

-- name: ring_for_ends
-- Only where somebody waits for one of these.
WITH told AS (DELETE FROM awaited WHERE run = ANY (:runs)
                 AND EXISTS (SELECT 1 FROM runs WHERE seq = run AND finished_at IS NOT NULL) RETURNING run)
SELECT set_config('synchronous_commit', 'off', true), pg_notify(:channel, :message)
 WHERE EXISTS (SELECT 1 FROM told);

-- name: forget_awaited
DELETE FROM awaited WHERE NOT EXISTS (SELECT 1 FROM runs WHERE seq = run AND finished_at IS NULL);
