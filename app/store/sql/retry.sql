-- Bring a dead job back with a fresh retry budget: attempts go on counting, the history stays. A start deadline
-- has had its effect and is dropped. No row comes back for a job that is not dead.
WITH risen AS (
  DELETE FROM {schema}.dead WHERE id = $2::uuid
  RETURNING {body}, state, attempt, {note}, num_nonnulls({note}) > 0 AS noted, coalesce($1::timestamptz, now()) AS now
), body AS (
  INSERT INTO {schema}.jobs
         (id, created_at, queue, type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff,
          budget_start, concurrency_key, unique_key, dead_letter_queue, traceparent, tags, metadata, source, payload,
          unique_scope, unique_window_seconds)
  SELECT id, created_at, queue, type, priority, now, lease_seconds, timeout_seconds, max_retries, backoff,
         attempt, concurrency_key, unique_key, dead_letter_queue, traceparent, tags, metadata, source, payload,
         unique_scope, unique_window_seconds
    FROM risen
), note AS (
  INSERT INTO {schema}.notes (job_id, {note}) SELECT id, {note} FROM risen WHERE noted
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since)
  SELECT id, queue, type, priority, attempt, noted, now
    FROM risen
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, failed, cancelled, expired)
  SELECT queue, 1, CASE WHEN state = 'failed' THEN -1 END, CASE WHEN state = 'cancelled' THEN -1 END,
         CASE WHEN state = 'expired' THEN -1 END
    FROM risen
)
SELECT queue, type, state FROM risen
