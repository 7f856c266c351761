-- Which jobs took these unique keys last ($2 queues, $3 keys), and how they stand now: where they live, and whether a
-- worker has ever had them. What becomes of the keys is not decided here.
SELECT coalesce($1::timestamptz, now()) AS now, k.queue, k.key, k.job_id, k.scope, k.until, place.state,
       coalesce(place.attempt, 0) > 0
       OR EXISTS (SELECT FROM {schema}.attempts AS a WHERE a.job_id = k.job_id OFFSET 0) AS started
  FROM unnest($2::text[], $3::text[]) AS t(queue, key)
 CROSS JOIN LATERAL (
        SELECT u.* FROM {schema}.unique_keys AS u WHERE u.queue = t.queue AND u.key = t.key OFFSET 0) AS k
  LEFT JOIN LATERAL (
        SELECT 'ready' AS state, r.attempt FROM {schema}.ready AS r WHERE r.id = k.job_id
        UNION ALL
        SELECT CASE WHEN s.is_retry THEN 'retry' ELSE 'scheduled' END, s.attempt
          FROM {schema}.scheduled AS s WHERE s.id = k.job_id
        UNION ALL
        SELECT 'held', h.attempt FROM {schema}.held AS h WHERE h.id = k.job_id
        UNION ALL
        SELECT 'active', l.attempt FROM {schema}.leases AS l WHERE l.id = k.job_id
        OFFSET 0) AS place ON true
