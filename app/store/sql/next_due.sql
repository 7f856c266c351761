-- In how many seconds the next delayed job is due.
SELECT extract(epoch FROM s.run_at - coalesce($1::timestamptz, now())) AS seconds
  FROM {schema}.scheduled AS s
 ORDER BY s.run_at
 LIMIT 1
