-- Remove terminal jobs ($1) in one of these states ($2), with their attempts, and let go of the unique keys that their
-- windows may still hold. No row comes back for a job that is in none of them.
WITH buried AS (
  DELETE FROM {schema}.dead WHERE id = ANY ($1::uuid[]) AND state = ANY ($2::text[])
  RETURNING id, queue, type, state, unique_key
), done AS (
  DELETE FROM {schema}.history WHERE id = ANY ($1::uuid[]) AND 'completed' = ANY ($2::text[])
  RETURNING id, queue, type, 'completed' AS state, unique_key
), removed AS (
  SELECT * FROM buried UNION ALL SELECT * FROM done
), forgotten AS (
  DELETE FROM {schema}.attempts
   WHERE job_id = ANY (ARRAY(SELECT id FROM removed))
), let_go AS (
  DELETE FROM {schema}.unique_keys
   WHERE ctid = ANY (ARRAY(
           SELECT mine.tid
             FROM (SELECT * FROM removed WHERE unique_key IS NOT NULL ORDER BY queue, unique_key) AS r
            CROSS JOIN LATERAL (
                   SELECT u.ctid AS tid
                     FROM {schema}.unique_keys AS u
                    WHERE u.queue = r.queue AND u.key = r.unique_key AND u.job_id = r.id
                      FOR UPDATE) AS mine))
), counted AS (
  INSERT INTO {schema}.deltas (queue, completed, failed, cancelled, expired)
  SELECT queue, -nullif(count(*) FILTER (WHERE state = 'completed'), 0),
         -nullif(count(*) FILTER (WHERE state = 'failed'), 0), -nullif(count(*) FILTER (WHERE state = 'cancelled'), 0),
         -nullif(count(*) FILTER (WHERE state = 'expired'), 0)
    FROM removed
   GROUP BY queue
)
SELECT id, queue, type, state FROM removed
