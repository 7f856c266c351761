-- Which schedules are due whose jobs have a unique key, the longest due first, behind the instant $3 and the name $4.
SELECT s.next_fire_at, s.name
  FROM {schema}.schedules AS s
 WHERE NOT s.paused
   AND s.next_fire_at <= coalesce($1::timestamptz, now())
   AND (s.next_fire_at, s.name) > ($3::timestamptz, $4::text)
   AND {keyed}
 ORDER BY s.next_fire_at, s.name
 LIMIT $2::int
