-- Lock the rows of unique keys ($2 queues, $3 keys) in this order, and make those that there are not, for the jobs $4.
-- Waits for whoever else wants one of them. Only those that were made come back: of the others the next statement
-- must ask who holds them.
INSERT INTO {schema}.unique_keys (queue, key, job_id, scope, until)
SELECT t.queue, t.key, t.job_id, t.scope,
       coalesce($1::timestamptz, now()) + t.window_seconds * interval '1 second'
  FROM unnest($2::text[], $3::text[], $4::uuid[], $5::text[], $6::float8[])
       WITH ORDINALITY AS t(queue, key, job_id, scope, window_seconds, place)
 ORDER BY t.place
ON CONFLICT (queue, key) DO UPDATE SET job_id = excluded.job_id WHERE false
RETURNING queue, key
