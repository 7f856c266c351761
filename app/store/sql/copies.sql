-- Copies of dead letters that are ready in a queue ($1), behind a place in its line ($2 priority, $3 since, $4 id),
-- ready since no later than $5; at most $6.
SELECT r.id, r.priority, r.since, body.source
  FROM {schema}.ready AS r
 CROSS JOIN LATERAL (SELECT b.source FROM {schema}.jobs AS b WHERE b.id = r.id OFFSET 0) AS body
  LEFT JOIN LATERAL (
        SELECT n.error_group FROM {schema}.notes AS n WHERE r.noted AND n.job_id = r.id OFFSET 0) AS note ON true
 WHERE r.queue = $1::text AND (r.priority, r.since) >= ($2::smallint, $3::timestamptz)
   AND (r.priority, r.since, r.id) > ($2::smallint, $3::timestamptz, $4::uuid) AND r.since <= $5::timestamptz
   AND body.source IS NOT NULL {of_group}
 ORDER BY r.priority, r.since, r.id
 LIMIT $6::int
