-- Store new jobs: each body, its place, the count. One array a column; a job is due at the later of now, its
-- run_at and now plus its delay. Each is a microsecond younger than the one before it, and that is its place in line.
-- The returned rows keep the order of the arrays.
WITH item AS MATERIALIZED (
  SELECT t.*, clock.now, greatest(t.expires_at, clock.now + t.expires_in_seconds * interval '1 second') AS deadline_at,
         greatest(clock.now, t.run_at, clock.now + t.delay_seconds * interval '1 second') AS due_at
    FROM unnest(
           $2::uuid[], $3::text[], $4::text[], $5::smallint[], $6::timestamptz[], $7::float8[], $8::float8[],
           $9::float8[], $10::int[], $11::jsonb[], $12::text[], $13::jsonb[], $14::bytea[], $15::bytea[],
           $16::timestamptz[], $17::float8[], $18::text[], $19::text[], $20::float8[], $21::text[], $22::bytea[])
         WITH ORDINALITY
         AS t(id, queue, type, priority, run_at, delay_seconds, lease_seconds,
              timeout_seconds, max_retries, backoff, traceparent, tags, metadata, payload,
              expires_at, expires_in_seconds, unique_key, unique_scope, unique_window_seconds, dead_letter_queue, source,
              place)
   CROSS JOIN LATERAL (
           SELECT coalesce($1::timestamptz, now()) + (t.place - 1) * interval '1 microsecond' AS now) AS clock
), body AS (
  INSERT INTO {schema}.jobs
         (id, created_at, queue, type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff,
          budget_start, traceparent, tags, metadata, payload, expires_at, unique_key, unique_scope,
          unique_window_seconds, dead_letter_queue, source)
  SELECT id, now, queue, type, priority, due_at, lease_seconds, timeout_seconds, max_retries, backoff,
         0, traceparent, tags, metadata, payload, deadline_at, unique_key, unique_scope,
         unique_window_seconds, dead_letter_queue, source
    FROM item
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since, expires_at)
  SELECT id, queue, type, priority, 0, false, now, deadline_at
    FROM item
   WHERE due_at <= now
), delayed AS (
  INSERT INTO {schema}.scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry, expires_at)
  SELECT id, queue, type, priority, 0, false, due_at, false, deadline_at
    FROM item
   WHERE due_at > now
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, scheduled)
  SELECT queue, nullif(count(*) FILTER (WHERE due_at <= now), 0), nullif(count(*) FILTER (WHERE due_at > now), 0)
    FROM item
   GROUP BY queue
)
SELECT now AS created_at, due_at AS run_at, deadline_at AS expires_at
  FROM item
 ORDER BY place
