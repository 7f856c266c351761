-- Give unique keys that this transaction has locked ($2 queues, $3 keys) to the jobs $4, each for its window ($6
-- seconds) from $7, or from now.
WITH item AS MATERIALIZED (
  SELECT mine.tid, t.job_id, t.scope,
         coalesce(t.begins_at, $1::timestamptz, now()) + t.window_seconds * interval '1 second' AS until
    FROM unnest($2::text[], $3::text[], $4::uuid[], $5::text[], $6::float8[], $7::timestamptz[])
         AS t(queue, key, job_id, scope, window_seconds, begins_at)
   CROSS JOIN LATERAL (
          SELECT u.ctid AS tid FROM {schema}.unique_keys AS u WHERE u.queue = t.queue AND u.key = t.key OFFSET 0) AS mine
)
UPDATE {schema}.unique_keys AS u
   SET (job_id, scope, until) = (SELECT job_id, scope, until FROM item WHERE item.tid = u.ctid)
 WHERE u.ctid = ANY (ARRAY(SELECT tid FROM item))
