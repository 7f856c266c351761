-- Bring dead jobs ($2) back, if they are in one of these states ($3), each with a fresh retry budget: attempts go on
-- counting, the history stays. A start deadline goes on where it still lies ahead of a job that was never started (or
-- was given back, which does not count); else it has had its effect and is dropped. So is a dead letter queue that a
-- redrive has made a job's own. The first of them stands first in line. No row comes back for a job that is in no such
-- state.
WITH risen AS (
  DELETE FROM {schema}.dead WHERE id = ANY ($2::uuid[]) AND state = ANY ($3::text[])
  RETURNING {body}, state, attempt, {note}, num_nonnulls({note}) > 0 AS noted,
            CASE WHEN attempt = 0 AND expires_at > coalesce($1::timestamptz, now()) THEN expires_at END AS start_by
), placed AS MATERIALIZED (
  SELECT id, queue, type, priority, attempt, noted, state, start_by,
         coalesce($1::timestamptz, now())
           + (row_number() OVER (ORDER BY array_position($2::uuid[], id)) - 1) * interval '1 microsecond' AS since
    FROM risen
), body AS (
  INSERT INTO {schema}.jobs
         (id, created_at, queue, type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff,
          budget_start, expires_at, concurrency_key, unique_key, dead_letter_queue, traceparent, tags, metadata,
          source, payload, unique_scope, unique_window_seconds)
  SELECT id, created_at, queue, type, priority, coalesce($1::timestamptz, now()), lease_seconds, timeout_seconds,
         max_retries, backoff, attempt, start_by, concurrency_key, unique_key, nullif(dead_letter_queue, queue),
         traceparent, tags, metadata, source, payload, unique_scope, unique_window_seconds
    FROM risen
), note AS (
  INSERT INTO {schema}.notes (job_id, {note}) SELECT id, {note} FROM risen WHERE noted
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since, expires_at)
  SELECT id, queue, type, priority, attempt, noted, since, start_by
    FROM placed
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, failed, cancelled, expired)
  SELECT queue, count(*), -nullif(count(*) FILTER (WHERE state = 'failed'), 0),
         -nullif(count(*) FILTER (WHERE state = 'cancelled'), 0), -nullif(count(*) FILTER (WHERE state = 'expired'), 0)
    FROM placed
   GROUP BY queue
)
SELECT id, queue, type, state, priority, since FROM placed
