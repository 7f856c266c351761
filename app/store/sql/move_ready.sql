-- Let ready jobs ($1) stand in another queue ($2), each at its old place by time: it is no dead letter queue of those
-- who come to it. Their places are deleted and inserted anew, so that a claim with an older snapshot misses them.
WITH gone AS (
  DELETE FROM {schema}.ready WHERE id = ANY ($1::uuid[])
  RETURNING id, queue, type, priority, attempt, noted, since, expires_at
), body AS (
  UPDATE {schema}.jobs SET queue = $2::text, dead_letter_queue = nullif(dead_letter_queue, $2::text)
   WHERE id = ANY (ARRAY(SELECT id FROM gone))
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since, expires_at)
  SELECT id, $2::text, type, priority, attempt, noted, since, expires_at FROM gone
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready)
  SELECT queue, -count(*) FROM gone GROUP BY queue
  UNION ALL
  SELECT $2::text, count(*) FROM gone HAVING count(*) > 0
)
SELECT id, $2::text AS queue, type, 'ready' AS state, priority, since FROM gone
