-- Remove copies ($2) that this transaction has locked, with their attempts. Those with a new id ($3) go home as new jobs
-- in the queue ($4) that they came from: their originals are gone. Their dead letters come here again.
WITH item AS MATERIALIZED (
  SELECT t.* FROM unnest($2::uuid[], $3::uuid[], $4::text[]) WITH ORDINALITY AS t(id, new_id, home, place)
), gone AS (
  DELETE FROM {schema}.ready WHERE id = ANY ($2::uuid[]) RETURNING id, queue, type
), body AS (
  DELETE FROM {schema}.jobs WHERE id = ANY (ARRAY(SELECT id FROM gone)) RETURNING {body}
), note AS (
  DELETE FROM {schema}.notes WHERE job_id = ANY (ARRAY(SELECT id FROM gone))
), forgotten AS (
  DELETE FROM {schema}.attempts WHERE job_id = ANY (ARRAY(SELECT id FROM gone))
), anew AS MATERIALIZED (
  SELECT item.new_id, item.home, body.*,
         coalesce($1::timestamptz, now()) + (item.place - 1) * interval '1 microsecond' AS now
    FROM item
    JOIN body ON body.id = item.id
   WHERE item.new_id IS NOT NULL
), new_body AS (
  INSERT INTO {schema}.jobs
         (id, created_at, queue, type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff,
          budget_start, concurrency_key, dead_letter_queue, traceparent, tags, metadata, payload)
  SELECT new_id, now, home, type, priority, now, lease_seconds, timeout_seconds, max_retries, backoff,
         0, concurrency_key, nullif(queue, home), traceparent, tags, metadata, payload
    FROM anew
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since)
  SELECT new_id, home, type, priority, 0, false, now FROM anew
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready)
  SELECT queue, -count(*) FROM gone GROUP BY queue
  UNION ALL
  SELECT home, count(*) FROM anew GROUP BY home
)
SELECT gone.id, gone.queue, gone.type, anew.new_id, anew.home, anew.priority, anew.now AS since
  FROM gone
  LEFT JOIN anew ON anew.id = gone.id
