-- Make delayed jobs ready whose time has come, the longest due first. They join the line now, behind those that
-- were ready before them. Only those due since $3. There is always one row.
WITH due AS MATERIALIZED (
  SELECT s.ctid AS tid
    FROM {schema}.scheduled AS s
   WHERE s.run_at <= coalesce($1::timestamptz, now())
     AND s.run_at >= $3::timestamptz
   ORDER BY s.run_at
   LIMIT $2::int
     FOR UPDATE SKIP LOCKED
), gone AS (
  DELETE FROM {schema}.scheduled
   WHERE ctid = ANY (ARRAY(SELECT tid FROM due))
  RETURNING id, queue, type, priority, attempt, noted, run_at, is_retry, expires_at
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since, expires_at)
  SELECT id, queue, type, priority, attempt, noted,
         coalesce($1::timestamptz, now()) + row_number() OVER (ORDER BY run_at, id) * interval '1 microsecond', expires_at
    FROM gone
  RETURNING id, queue, type, priority, since
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, scheduled, retry)
  SELECT queue, count(*), -nullif(count(*) FILTER (WHERE NOT is_retry), 0), -nullif(count(*) FILTER (WHERE is_retry), 0)
    FROM gone
   GROUP BY queue
)
SELECT clock.now, waiting.*
  FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
  LEFT JOIN waiting ON true
