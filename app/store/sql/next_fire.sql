-- In how many seconds the next schedule is due, of all those to come and of one kind of those that are due already.
SELECT extract(epoch FROM s.next_fire_at - coalesce($1::timestamptz, now())) AS seconds
  FROM {schema}.schedules AS s
 WHERE NOT s.paused
   AND s.next_fire_at IS NOT NULL
   AND (s.next_fire_at > coalesce($1::timestamptz, now()) OR {kind})
 ORDER BY s.next_fire_at
 LIMIT 1
