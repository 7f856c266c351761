-- Which schedules are due whose jobs have a unique key, the longest due first.
SELECT s.name
  FROM {schema}.schedules AS s
 WHERE NOT s.paused
   AND s.next_fire_at <= coalesce($1::timestamptz, now())
   AND s.definition -> 'job' -> 'unique' IS NOT NULL
 ORDER BY s.next_fire_at
 LIMIT $2::int
