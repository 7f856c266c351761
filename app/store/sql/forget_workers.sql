-- Forget workers that were not heard of since $1, and those beyond the $2 last heard of; at most $3 at once. One that is
-- heard of at this moment stays.
WITH late AS MATERIALIZED (
  SELECT name, last_seen_at
    FROM (SELECT w.name, w.last_seen_at, row_number() OVER (ORDER BY w.last_seen_at DESC, w.name) AS place
            FROM {schema}.workers AS w) AS ranked
   WHERE last_seen_at < $1::timestamptz OR place > $2::int
   LIMIT $3::int
), mine AS MATERIALIZED (
  SELECT w.name
    FROM late
    JOIN {schema}.workers AS w ON w.name = late.name AND w.last_seen_at = late.last_seen_at
     FOR UPDATE OF w SKIP LOCKED
), gone AS (
  DELETE FROM {schema}.workers WHERE name = ANY (ARRAY(SELECT name FROM mine)) RETURNING directive
)
SELECT count(*) AS forgotten, count(*) FILTER (WHERE directive <> 'continue') AS directed FROM gone
