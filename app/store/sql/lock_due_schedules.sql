-- Lock schedules that are due, the longest due first; those that others hold are being decided, or changed.
SELECT coalesce($1::timestamptz, now()) AS now, {schedule}
  FROM {schema}.schedules AS s
 WHERE NOT s.paused
   AND s.next_fire_at <= coalesce($1::timestamptz, now())
   AND {which}
 ORDER BY s.next_fire_at
 LIMIT $2::int
   FOR UPDATE SKIP LOCKED
