-- Remove dead jobs of queues ($1) that ended before an instant of each queue's own ($2), the oldest first, at most $3 of
-- each.
WITH old AS MATERIALIZED (
  SELECT mine.id
    FROM unnest($1::text[], $2::timestamptz[]) AS q(name, before)
   CROSS JOIN LATERAL (
          SELECT d.id
            FROM {schema}.dead AS d
           WHERE d.queue = q.name AND d.finished_at < q.before
           ORDER BY d.finished_at
           LIMIT $3::int
             FOR UPDATE SKIP LOCKED) AS mine
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
