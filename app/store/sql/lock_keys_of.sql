-- Lock the unique keys of a queue ($1) that these jobs ($2) have, in their order. Whoever wants a job's key and its place has
-- the key first, here as in a replacement: so nobody waits in a ring.
WITH keyed AS MATERIALIZED (
  SELECT b.id, b.unique_key
    FROM {schema}.jobs AS b
   WHERE b.id = ANY ($2::uuid[]) AND b.unique_key IS NOT NULL
   ORDER BY b.unique_key
)
SELECT mine.key
  FROM keyed
 CROSS JOIN LATERAL (
        SELECT u.key
          FROM {schema}.unique_keys AS u
         WHERE u.queue = $1::text AND u.key = keyed.unique_key AND u.job_id = keyed.id
           FOR UPDATE) AS mine
