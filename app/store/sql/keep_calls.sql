-- Write down what came of calls ($2 owners, $3 paths, $4 keys, $5 hashes of bodies, $6 arrays of jobs) whose keys this
-- transaction has locked. A call of which nothing came is forgotten.
WITH call AS MATERIALIZED (
  SELECT mine.tid, t.body_hash, t.job_ids::uuid[] AS job_ids,
         array_remove(t.job_ids::uuid[], NULL) = '{}' AS is_nothing
    FROM unnest($2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[])
         AS t(owner, path, key, body_hash, job_ids)
   CROSS JOIN LATERAL (
          SELECT i.ctid AS tid
            FROM {schema}.idempotency_keys AS i
           WHERE i.owner = t.owner AND i.path = t.path AND i.key = t.key
          OFFSET 0) AS mine
), forgotten AS (
  DELETE FROM {schema}.idempotency_keys WHERE ctid = ANY (ARRAY(SELECT tid FROM call WHERE is_nothing))
)
UPDATE {schema}.idempotency_keys AS i
   SET (body_hash, job_ids, created_at) = (
         SELECT call.body_hash, call.job_ids, coalesce($1::timestamptz, now()) FROM call WHERE call.tid = i.ctid)
 WHERE i.ctid = ANY (ARRAY(SELECT tid FROM call WHERE NOT is_nothing))
