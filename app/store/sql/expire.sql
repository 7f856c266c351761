-- Bury jobs whose start deadline has passed before any worker took them, the longest overdue first, up to $2 of each
-- place. Only deadlines since $3. What a claim, a cancel or another expiry holds at this moment is left to it. There is
-- always one row.
WITH ready AS MATERIALIZED (
  SELECT p.ctid AS tid
    FROM {schema}.ready AS p
   WHERE p.expires_at <= coalesce($1::timestamptz, now()) AND p.expires_at >= $3::timestamptz
   ORDER BY p.expires_at
   LIMIT $2::int
     FOR UPDATE SKIP LOCKED
), scheduled AS MATERIALIZED (
  SELECT p.ctid AS tid
    FROM {schema}.scheduled AS p
   WHERE p.expires_at <= coalesce($1::timestamptz, now()) AND p.expires_at >= $3::timestamptz
   ORDER BY p.expires_at
   LIMIT $2::int
     FOR UPDATE SKIP LOCKED
), held AS MATERIALIZED (
  SELECT p.ctid AS tid
    FROM {schema}.held AS p
   WHERE p.expires_at <= coalesce($1::timestamptz, now()) AND p.expires_at >= $3::timestamptz
   ORDER BY p.expires_at
   LIMIT $2::int
     FOR UPDATE SKIP LOCKED
), gone_ready AS (
  DELETE FROM {schema}.ready WHERE ctid = ANY (ARRAY(SELECT tid FROM ready))
  RETURNING id, queue, type, attempt, noted, 'ready' AS state
), gone_scheduled AS (
  DELETE FROM {schema}.scheduled WHERE ctid = ANY (ARRAY(SELECT tid FROM scheduled))
  RETURNING id, queue, type, attempt, noted, 'scheduled' AS state
), gone_held AS (
  DELETE FROM {schema}.held WHERE ctid = ANY (ARRAY(SELECT tid FROM held))
  RETURNING id, queue, type, attempt, noted, 'held' AS state
), place AS (
  SELECT * FROM gone_ready UNION ALL SELECT * FROM gone_scheduled UNION ALL SELECT * FROM gone_held
), body AS (
  DELETE FROM {schema}.jobs WHERE id = ANY (ARRAY(SELECT id FROM place)) RETURNING {body}
), note AS (
  DELETE FROM {schema}.notes
   WHERE job_id = ANY (ARRAY(SELECT id FROM place WHERE noted)) RETURNING job_id, {note}
), buried AS (
  INSERT INTO {schema}.dead ({body}, state, attempt, reason, {note}, finished_at)
  SELECT {body.}, 'expired', place.attempt, 'expired', {note.}, coalesce($1::timestamptz, now())
    FROM place
    JOIN body ON body.id = place.id
    LEFT JOIN note ON note.job_id = place.id
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, scheduled, held, expired)
  SELECT queue, -nullif(count(*) FILTER (WHERE state = 'ready'), 0),
         -nullif(count(*) FILTER (WHERE state = 'scheduled'), 0), -nullif(count(*) FILTER (WHERE state = 'held'), 0),
         count(*)
    FROM place
   GROUP BY queue
)
SELECT clock.now, place.id, place.queue, place.type
  FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
  LEFT JOIN place ON true
