-- Remove terminal jobs ($1) in one of these states ($2), with their attempts. No row comes back for a job that is in
-- none of them.
WITH buried AS (
  DELETE FROM {schema}.dead WHERE id = ANY ($1::uuid[]) AND state = ANY ($2::text[]) RETURNING id, queue, type, state
), done AS (
  DELETE FROM {schema}.history WHERE id = ANY ($1::uuid[]) AND 'completed' = ANY ($2::text[])
  RETURNING id, queue, type, 'completed' AS state
), removed AS (
  SELECT * FROM buried UNION ALL SELECT * FROM done
), forgotten AS (
  DELETE FROM {schema}.attempts
   WHERE job_id = ANY (ARRAY(SELECT id FROM removed))
), counted AS (
  INSERT INTO {schema}.deltas (queue, completed, failed, cancelled, expired)
  SELECT queue, -nullif(count(*) FILTER (WHERE state = 'completed'), 0),
         -nullif(count(*) FILTER (WHERE state = 'failed'), 0), -nullif(count(*) FILTER (WHERE state = 'cancelled'), 0),
         -nullif(count(*) FILTER (WHERE state = 'expired'), 0)
    FROM removed
   GROUP BY queue
)
SELECT id, queue, type, state FROM removed
