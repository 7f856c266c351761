-- Remove dead jobs that ended before $1, the oldest first.
WITH old AS MATERIALIZED (
  SELECT d.id
    FROM {schema}.dead AS d
   WHERE d.finished_at < $1::timestamptz
   ORDER BY d.finished_at
   LIMIT $2::int
     FOR UPDATE SKIP LOCKED
), gone AS (
  DELETE FROM {schema}.dead WHERE id = ANY (ARRAY(SELECT id FROM old)) RETURNING queue, state
), counted AS (
  INSERT INTO {schema}.deltas (queue, failed, cancelled, expired)
  SELECT queue, -nullif(count(*) FILTER (WHERE state = 'failed'), 0), -nullif(count(*) FILTER (WHERE state = 'cancelled'), 0),
         -nullif(count(*) FILTER (WHERE state = 'expired'), 0)
    FROM gone
   GROUP BY queue
)
SELECT count(*) FROM gone
