-- The same for those who wait for jobs of one type only.
SELECT line.queue, line.type, found.count
  FROM unnest($1::text[], $2::text[], $3::int[]) AS line(queue, type, waiters)
 CROSS JOIN LATERAL (
        SELECT count(*) AS count
          FROM (SELECT FROM {schema}.ready AS r
                 WHERE (r.queue || '/' || r.type) = line.queue || '/' || line.type LIMIT line.waiters) AS head) AS found
 WHERE found.count > 0
