-- Look at the next $6 ready jobs of a queue ($1) behind a place in its line ($2 priority, $3 since, $4 id), ready since no
-- later than $5. Those that are wanted come back: copies of dead letters; and the last of a full look, wherever it is.
WITH head AS MATERIALIZED (
  SELECT r.id, r.priority, r.since, r.noted
    FROM {schema}.ready AS r
   WHERE r.queue = $1::text AND (r.priority, r.since) >= ($2::smallint, $3::timestamptz)
     AND (r.priority, r.since, r.id) > ($2::smallint, $3::timestamptz, $4::uuid) AND r.since <= $5::timestamptz
   ORDER BY r.priority, r.since, r.id
   LIMIT $6::int
), seen AS MATERIALIZED (
  SELECT head.*, row_number() OVER (ORDER BY head.priority, head.since, head.id) = $6::int AS is_last FROM head
), told AS (
  SELECT seen.id, seen.priority, seen.since, seen.is_last, body.source,
         (body.source IS NOT NULL {of_group}) IS TRUE AS wanted
    FROM seen
   CROSS JOIN LATERAL (SELECT b.source FROM {schema}.jobs AS b WHERE b.id = seen.id OFFSET 0) AS body
    LEFT JOIN LATERAL (
          SELECT n.error_group FROM {schema}.notes AS n WHERE seen.noted AND n.job_id = seen.id OFFSET 0) AS note ON true
)
SELECT id, priority, since, source, wanted, is_last
  FROM told
 WHERE wanted OR is_last
 ORDER BY priority, since, id
