-- Remove a terminal job with its attempts. No row comes back for a job that is not terminal.
WITH buried AS (
  DELETE FROM {schema}.dead WHERE id = $1::uuid RETURNING id, queue, type, state
), done AS (
  DELETE FROM {schema}.history WHERE id = $1::uuid
  RETURNING id, queue, type, 'completed' AS state
), removed AS (
  SELECT * FROM buried UNION ALL SELECT * FROM done
), forgotten AS (
  DELETE FROM {schema}.attempts
   WHERE job_id = ANY (ARRAY(SELECT id FROM removed))
), counted AS (
  INSERT INTO {schema}.deltas (queue, completed, failed, cancelled, expired)
  SELECT queue, CASE WHEN state = 'completed' THEN -1 END, CASE WHEN state = 'failed' THEN -1 END,
         CASE WHEN state = 'cancelled' THEN -1 END, CASE WHEN state = 'expired' THEN -1 END
    FROM removed
)
SELECT queue, type, state FROM removed
