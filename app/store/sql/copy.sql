-- Enqueue copies of dead jobs ($2) that this transaction has buried: under new ids ($3), into other queues ($4), with
-- where they come from ($5). A copy has a fresh budget and its original's error, no unique key and no start deadline;
-- its own dead letters go where its queue's policy says. The returned rows tell where the copies stand.
WITH copy AS MATERIALIZED (
  SELECT t.new_id, t.queue, t.source, clock.now, dead.*,
         coalesce(target.policy -> 'types' -> dead.type ->> 'dead_letter_queue', target.policy ->> 'dead_letter_queue')
           AS dead_letter_queue
    FROM unnest($2::uuid[], $3::uuid[], $4::text[], $5::bytea[]) WITH ORDINALITY AS t(id, new_id, queue, source, place)
   CROSS JOIN LATERAL (
          SELECT coalesce($1::timestamptz, now()) + (t.place - 1) * interval '1 microsecond' AS now) AS clock
   CROSS JOIN LATERAL (
          SELECT d.type, d.priority, d.lease_seconds, d.timeout_seconds, d.max_retries, d.backoff, d.concurrency_key,
                 d.traceparent, d.tags, d.metadata, d.payload, d.last_error, d.error_type, d.error_group
            FROM {schema}.dead AS d
           WHERE d.id = t.id
          OFFSET 0) AS dead
    LEFT JOIN LATERAL (SELECT q.policy FROM {schema}.queues AS q WHERE q.name = t.queue OFFSET 0) AS target ON true
), body AS (
  INSERT INTO {schema}.jobs
         (id, created_at, queue, type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff,
          budget_start, concurrency_key, dead_letter_queue, traceparent, tags, metadata, source, payload)
  SELECT new_id, now, queue, type, priority, now, lease_seconds, timeout_seconds, max_retries, backoff,
         0, concurrency_key, dead_letter_queue, traceparent, tags, metadata, source, payload
    FROM copy
), note AS (
  INSERT INTO {schema}.notes (job_id, last_error, error_type, error_group)
  SELECT new_id, last_error, error_type, error_group FROM copy
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since)
  SELECT new_id, queue, type, priority, 0, true, now FROM copy
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready) SELECT queue, count(*) FROM copy GROUP BY queue
)
SELECT new_id AS id, queue, type, priority, now AS since FROM copy
