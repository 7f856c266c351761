-- In how many seconds the next delayed job is due, or was since $2.
SELECT extract(epoch FROM s.run_at - coalesce($1::timestamptz, now())) AS seconds
  FROM {schema}.scheduled AS s
 WHERE s.run_at >= $2::timestamptz
 ORDER BY s.run_at
 LIMIT 1
