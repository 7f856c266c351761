-- Add the oldest deltas to the counts. Another folder's rows are skipped, so no delta is added twice. Begins at $2: what
-- was folded leaves dead entries to walk over. Its COMMIT need not wait for the disk: what a crash takes back is
-- folded again.
WITH old AS MATERIALIZED (
  SELECT d.seq
    FROM {schema}.deltas AS d
   WHERE d.seq >= $2::bigint
   ORDER BY d.seq
   LIMIT $1::int
     FOR UPDATE SKIP LOCKED
), gone AS (
  DELETE FROM {schema}.deltas WHERE seq = ANY (ARRAY(SELECT seq FROM old)) RETURNING *
), folded AS (
  INSERT INTO {schema}.counts AS c
         (queue, scheduled, ready, held, active, retry, completed, failed, cancelled, expired)
  SELECT queue, coalesce(sum(scheduled), 0), coalesce(sum(ready), 0), coalesce(sum(held), 0), coalesce(sum(active), 0),
         coalesce(sum(retry), 0), coalesce(sum(completed), 0), coalesce(sum(failed), 0), coalesce(sum(cancelled), 0),
         coalesce(sum(expired), 0)
    FROM gone
   GROUP BY queue
   ORDER BY queue
  ON CONFLICT (queue) DO UPDATE
     SET scheduled = c.scheduled + excluded.scheduled, ready = c.ready + excluded.ready, held = c.held + excluded.held,
         active = c.active + excluded.active, retry = c.retry + excluded.retry,
         completed = c.completed + excluded.completed, failed = c.failed + excluded.failed,
         cancelled = c.cancelled + excluded.cancelled, expired = c.expired + excluded.expired
)
SELECT count(gone.seq), max(gone.seq) AS last
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS unhurried
  LEFT JOIN gone ON true
