-- Let jobs that wait take the fields of others, each with its unique key locked by this transaction. A job keeps its
-- id, its birth, its attempts, and while it stays ready its place in line. Its place is deleted and inserted anew, so
-- that a claim with an older snapshot misses it. No row comes back for a job that no longer waits, or that another
-- transaction has moved since this statement began.
WITH item AS MATERIALIZED (
  SELECT t.*, clock.now, greatest(t.expires_at, clock.now + t.expires_in_seconds * interval '1 second') AS deadline_at,
         greatest(clock.now, t.run_at, clock.now + t.delay_seconds * interval '1 second') AS due_at
    FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
   CROSS JOIN unnest(
           $2::uuid[], $3::text[], $4::smallint[], $5::timestamptz[], $6::float8[], $7::float8[], $8::float8[],
           $9::int[], $10::jsonb[], $11::text[], $12::jsonb[], $13::bytea[], $14::bytea[], $15::timestamptz[],
           $16::float8[], $17::text[], $18::float8[], $19::text[])
         AS t(id, type, priority, run_at, delay_seconds, lease_seconds, timeout_seconds, max_retries, backoff,
              traceparent, tags, metadata, payload, expires_at, expires_in_seconds, unique_scope, unique_window_seconds,
              dead_letter_queue)
), gone_ready AS (
  DELETE FROM {schema}.ready WHERE id = ANY ($2::uuid[]) RETURNING id, queue, attempt, noted, since, 'ready' AS state
), gone_scheduled AS (
  DELETE FROM {schema}.scheduled WHERE id = ANY ($2::uuid[])
  RETURNING id, queue, attempt, noted, NULL::timestamptz AS since,
            CASE WHEN is_retry THEN 'retry' ELSE 'scheduled' END AS state
), place AS MATERIALIZED (
  SELECT item.*, old.queue, old.attempt, old.noted, old.state AS left_state, coalesce(old.since, item.now) AS since,
         old.since IS NOT NULL AS kept_place,
         CASE WHEN item.due_at <= item.now THEN 'ready' WHEN old.state = 'retry' THEN 'retry' ELSE 'scheduled' END AS state
    FROM item
    JOIN (SELECT * FROM gone_ready UNION ALL SELECT * FROM gone_scheduled) AS old ON old.id = item.id
), body AS (
  UPDATE {schema}.jobs AS b
     SET (type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff, traceparent, tags, metadata,
          payload, expires_at, unique_scope, unique_window_seconds, dead_letter_queue) = (
           SELECT type, priority, due_at, lease_seconds, timeout_seconds, max_retries, backoff, traceparent, tags,
                  metadata, payload, deadline_at, unique_scope, unique_window_seconds, dead_letter_queue
             FROM place
            WHERE place.id = b.id)
   WHERE b.id = ANY (ARRAY(SELECT id FROM place))
  RETURNING b.id, b.created_at
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since, expires_at)
  SELECT id, queue, type, priority, attempt, noted, since, CASE WHEN attempt = 0 THEN deadline_at END
    FROM place
   WHERE state = 'ready'
), delayed AS (
  INSERT INTO {schema}.scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry, expires_at)
  SELECT id, queue, type, priority, attempt, noted, due_at, state = 'retry', CASE WHEN attempt = 0 THEN deadline_at END
    FROM place
   WHERE state <> 'ready'
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, scheduled, retry)
  SELECT queue,
         count(*) FILTER (WHERE state = 'ready') - count(*) FILTER (WHERE left_state = 'ready'),
         count(*) FILTER (WHERE state = 'scheduled') - count(*) FILTER (WHERE left_state = 'scheduled'),
         count(*) FILTER (WHERE state = 'retry') - count(*) FILTER (WHERE left_state = 'retry')
    FROM place
   WHERE state <> left_state
   GROUP BY queue
)
SELECT place.id, place.queue, place.type, place.priority, place.state, place.since, place.kept_place, place.due_at,
       place.now, body.created_at
  FROM place
  JOIN body ON body.id = place.id
