-- How the attempt under this lease ended, for a repeat of the verb that ended it. Acks are kept in history.
SELECT a.verb, a.state, a.run_at
  FROM {schema}.attempts AS a
 WHERE a.job_id = $1::uuid AND a.lease_id = $2::uuid
UNION ALL
SELECT 'ack', 'completed', NULL
  FROM {schema}.history AS h
 WHERE h.id = $1::uuid AND h.lease_id = $2::uuid
