-- Write the verdicts on leases that this transaction has locked: end each lease, put the job where its verdict
-- says, keep the attempt. $2… name the job, its state, the attempts that count, when it is due, why it died, the
-- error with its type and group, how the attempt ended, and the verb that ended it.
WITH verdict AS MATERIALIZED (
  SELECT t.*, mine.queue, mine.type, mine.priority, mine.since, mine.noted, mine.lease_id, mine.leased_at,
         mine.worker, mine.attempt AS this_attempt, clock.now, t.state IN ('failed', 'cancelled') AS is_dead
    FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
   CROSS JOIN unnest(
           $2::uuid[], $3::text[], $4::int[], $5::timestamptz[], $6::text[], $7::bytea[], $8::text[], $9::text[],
           $10::text[], $11::text[])
         AS t(id, state, attempt, run_at, reason, error, error_type, error_group, outcome, verb)
   CROSS JOIN LATERAL (SELECT l.* FROM {schema}.leases AS l WHERE l.id = t.id OFFSET 0) AS mine
), gone AS (
  DELETE FROM {schema}.leases WHERE id = ANY (ARRAY(SELECT id FROM verdict))
), unstarted AS MATERIALIZED (
  -- A job whose first attempt was given back has not been started: its deadline holds again.
  SELECT verdict.id, body.expires_at
    FROM verdict
   CROSS JOIN LATERAL (SELECT b.expires_at FROM {schema}.jobs AS b WHERE b.id = verdict.id OFFSET 0) AS body
   WHERE verdict.attempt = 0 AND body.expires_at IS NOT NULL
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since, expires_at)
  SELECT verdict.id, queue, type, priority, attempt, noted, since, unstarted.expires_at
    FROM verdict
    LEFT JOIN unstarted ON unstarted.id = verdict.id
   WHERE state = 'ready'
), delayed AS (
  INSERT INTO {schema}.scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry, expires_at)
  SELECT verdict.id, queue, type, priority, attempt, noted OR error IS NOT NULL, run_at, state = 'retry',
         unstarted.expires_at
    FROM verdict
    LEFT JOIN unstarted ON unstarted.id = verdict.id
   WHERE state IN ('scheduled', 'retry')
), noted AS (
  INSERT INTO {schema}.notes (job_id, last_error, error_type, error_group)
  SELECT id, error, error_type, error_group
    FROM verdict
   WHERE NOT is_dead AND error IS NOT NULL
  ON CONFLICT (job_id) DO UPDATE
     SET last_error = excluded.last_error, error_type = excluded.error_type, error_group = excluded.error_group
), body AS (
  DELETE FROM {schema}.jobs WHERE id = ANY (ARRAY(SELECT id FROM verdict WHERE is_dead)) RETURNING {body}
), note AS (
  DELETE FROM {schema}.notes
   WHERE job_id = ANY (ARRAY(SELECT id FROM verdict WHERE is_dead AND noted))
  RETURNING job_id, {note}
), buried AS (
  INSERT INTO {schema}.dead
         ({body}, checkpoint, progress_percent, progress_message, last_error, error_type, error_group, state, attempt,
          reason, worker, started_at, finished_at)
  SELECT {body.}, note.checkpoint, note.progress_percent, note.progress_message,
         CASE WHEN verdict.error IS NULL THEN note.last_error ELSE verdict.error END,
         CASE WHEN verdict.error IS NULL THEN note.error_type ELSE verdict.error_type END,
         CASE WHEN verdict.error IS NULL THEN note.error_group ELSE verdict.error_group END,
         verdict.state, verdict.attempt, verdict.reason, verdict.worker, verdict.leased_at, verdict.now
    FROM verdict
    JOIN body ON body.id = verdict.id
    LEFT JOIN note ON note.job_id = verdict.id
), kept AS (
  INSERT INTO {schema}.attempts
         (job_id, lease_id, queue, attempt, worker, started_at, ended_at, outcome, verb, state, run_at, error)
  SELECT id, lease_id, queue, this_attempt, worker, leased_at, now, outcome, verb, state, run_at, error
    FROM verdict
)
INSERT INTO {schema}.deltas (queue, active, ready, scheduled, retry, failed, cancelled)
SELECT queue, -count(*),
       nullif(count(*) FILTER (WHERE state = 'ready'), 0), nullif(count(*) FILTER (WHERE state = 'scheduled'), 0),
       nullif(count(*) FILTER (WHERE state = 'retry'), 0), nullif(count(*) FILTER (WHERE state = 'failed'), 0),
       nullif(count(*) FILTER (WHERE state = 'cancelled'), 0)
  FROM verdict
 GROUP BY queue
