-- Cancel jobs ($2) that wait, or ask for the end of active ones, if they are in one of these states ($3). No row comes
-- back for a job that is in none of them, or that another transaction has moved since this statement began: the caller
-- looks again then.
WITH waiting AS (
  DELETE FROM {schema}.ready WHERE id = ANY ($2::uuid[]) AND 'ready' = ANY ($3::text[])
  RETURNING id, queue, type, attempt, noted, 'ready' AS state
), delayed AS (
  DELETE FROM {schema}.scheduled
   WHERE id = ANY ($2::uuid[]) AND CASE WHEN is_retry THEN 'retry' ELSE 'scheduled' END = ANY ($3::text[])
  RETURNING id, queue, type, attempt, noted, CASE WHEN is_retry THEN 'retry' ELSE 'scheduled' END AS state
), asked AS (
  UPDATE {schema}.leases SET cancel_requested = true
   WHERE id = ANY ($2::uuid[]) AND 'active' = ANY ($3::text[])
  RETURNING id, queue, type, 'active' AS state
), place AS (
  SELECT * FROM waiting UNION ALL SELECT * FROM delayed
), body AS (
  DELETE FROM {schema}.jobs WHERE id = ANY (ARRAY(SELECT id FROM place)) RETURNING {body}
), note AS (
  DELETE FROM {schema}.notes
   WHERE job_id = ANY (ARRAY(SELECT id FROM place WHERE noted)) RETURNING job_id, {note}
), buried AS (
  INSERT INTO {schema}.dead ({body}, state, attempt, reason, {note}, finished_at)
  SELECT {body.}, 'cancelled', place.attempt, 'cancelled', {note.}, coalesce($1::timestamptz, now())
    FROM place
    JOIN body ON body.id = place.id
    LEFT JOIN note ON note.job_id = place.id
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, scheduled, retry, cancelled)
  SELECT queue, -nullif(count(*) FILTER (WHERE state = 'ready'), 0),
         -nullif(count(*) FILTER (WHERE state = 'scheduled'), 0), -nullif(count(*) FILTER (WHERE state = 'retry'), 0),
         count(*)
    FROM place
   GROUP BY queue
)
SELECT id, queue, type, state FROM place
UNION ALL
SELECT id, queue, type, state FROM asked
