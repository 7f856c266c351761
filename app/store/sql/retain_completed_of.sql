-- Remove completed jobs of queues ($1) that ended before an instant of each queue's own ($2). No index knows when they
-- ended; but who ended before has been created before. So each queue's jobs are looked at by their ids, after $3 and up
-- to $4 (the last id of that instant), $6 of each at a time, in the days that began before $5 and no others. One row
-- for each queue that has any: how many were looked at, and the last of them.
WITH head AS MATERIALIZED (
  SELECT q.name, mine.id, mine.finished_at < q.before AS past
    FROM unnest($1::text[], $2::timestamptz[], $3::uuid[], $4::uuid[], $5::timestamptz[])
         AS q(name, before, after, until, day_end)
   CROSS JOIN LATERAL (
          SELECT h.id, h.finished_at
            FROM {schema}.history AS h
           WHERE h.queue = q.name AND h.id > q.after AND h.id <= q.until AND h.finished_at < q.day_end
           ORDER BY h.id
           LIMIT $6::int) AS mine
), gone AS (
  DELETE FROM {schema}.history
   WHERE id = ANY (ARRAY(SELECT id FROM head WHERE past)) AND finished_at < (SELECT max(day_end) FROM unnest($5::timestamptz[]) AS d(day_end))
  RETURNING queue
), counted AS (
  INSERT INTO {schema}.deltas (queue, completed)
  SELECT queue, -count(*) FROM gone GROUP BY queue
)
SELECT head.name, count(*) AS seen, (array_agg(head.id ORDER BY head.id DESC))[1] AS last,
       (SELECT count(*) FROM gone) AS removed
  FROM head
 GROUP BY head.name
