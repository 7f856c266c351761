-- The earlier calls that these idempotency keys ($2 owners, $3 paths, $4 keys) stand for, none older than $5 seconds.
SELECT k.owner, k.path, k.key, k.body_hash, k.job_ids
  FROM unnest($2::text[], $3::text[], $4::text[]) AS t(owner, path, key)
 CROSS JOIN LATERAL (
        SELECT i.*
          FROM {schema}.idempotency_keys AS i
         WHERE i.owner = t.owner AND i.path = t.path AND i.key = t.key
        OFFSET 0) AS k
 WHERE k.created_at > coalesce($1::timestamptz, now()) - $5::float8 * interval '1 second'
