-- Lock jobs ($1) that no worker has, where they stand. First part of an edit; what they are is read in a later
-- statement. No row comes back for one that another transaction has moved since this statement began.
WITH waiting AS MATERIALIZED (
  SELECT r.id, 'ready' AS state, r.attempt
    FROM {schema}.ready AS r WHERE r.id = ANY ($1::uuid[]) ORDER BY r.id FOR UPDATE
), delayed AS MATERIALIZED (
  SELECT s.id, CASE WHEN s.is_retry THEN 'retry' ELSE 'scheduled' END AS state, s.attempt
    FROM {schema}.scheduled AS s WHERE s.id = ANY ($1::uuid[]) ORDER BY s.id FOR UPDATE
), buried AS MATERIALIZED (
  SELECT d.id, d.state, d.attempt
    FROM {schema}.dead AS d WHERE d.id = ANY ($1::uuid[]) ORDER BY d.id FOR UPDATE
)
SELECT * FROM waiting UNION ALL SELECT * FROM delayed UNION ALL SELECT * FROM buried
