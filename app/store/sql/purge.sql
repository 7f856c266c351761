-- Remove jobs ($2) of a queue ($1) that this transaction has locked in their place, with all that belongs to them.
WITH gone AS (
  DELETE FROM {schema}.{place} WHERE id = ANY ($2::uuid[]) RETURNING id, noted, {state} AS state
), body AS (
  DELETE FROM {schema}.jobs WHERE id = ANY ($2::uuid[]) RETURNING id, created_at, unique_key
), note AS (
  DELETE FROM {schema}.notes WHERE job_id = ANY (ARRAY(SELECT id FROM gone WHERE noted))
), freed AS (
  DELETE FROM {schema}.unique_keys
   WHERE queue = $1::text AND key = ANY (ARRAY(SELECT unique_key FROM body WHERE unique_key IS NOT NULL))
     AND job_id = ANY ($2::uuid[])
), forgotten AS (
  -- Attempts end after their job's creation: older days need no look.
  DELETE FROM {schema}.attempts
   WHERE job_id = ANY ($2::uuid[]) AND ended_at >= (SELECT min(created_at) FROM body)
)
INSERT INTO {schema}.deltas (queue, ready, held, scheduled, retry)
SELECT $1::text,
       -nullif(count(*) FILTER (WHERE state = 'ready'), 0), -nullif(count(*) FILTER (WHERE state = 'held'), 0),
       -nullif(count(*) FILTER (WHERE state = 'scheduled'), 0), -nullif(count(*) FILTER (WHERE state = 'retry'), 0)
  FROM gone
