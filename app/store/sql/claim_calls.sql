-- Lock the idempotency keys of calls ($2 owners, $3 paths, $4 keys, $5 hashes of bodies, $6 arrays of the
-- jobs that they want to store) in this order, and make those that there are not. Waits for whoever else makes the same call. Only those that were made come back: the others the
-- next statement must look at.
INSERT INTO {schema}.idempotency_keys (owner, path, key, body_hash, job_ids, created_at)
SELECT t.owner, t.path, t.key, t.body_hash, t.job_ids::uuid[], coalesce($1::timestamptz, now())
  FROM unnest($2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[])
       WITH ORDINALITY AS t(owner, path, key, body_hash, job_ids, place)
 ORDER BY t.place
ON CONFLICT (owner, path, key) DO UPDATE SET created_at = excluded.created_at WHERE false
RETURNING owner, path, key
