-- Let failed jobs ($1) of one queue ($2) be of another one ($3). The returned rows tell the unique keys that they had.
WITH moved AS (
  UPDATE {schema}.dead SET queue = $3::text
   WHERE id = ANY ($1::uuid[]) AND queue = $2::text AND state = 'failed'
  RETURNING id, unique_key
), counted AS (
  INSERT INTO {schema}.deltas (queue, failed)
  SELECT t.queue, t.n * (SELECT count(*) FROM moved)
    FROM (VALUES ($2::text, -1), ($3::text, 1)) AS t(queue, n)
   WHERE EXISTS (SELECT FROM moved)
)
SELECT id, unique_key FROM moved
