-- How many jobs are ready on each queue that somebody waits at, counted up to the number who wait.
SELECT line.queue, found.count
  FROM unnest($1::text[], $2::int[]) AS line(queue, waiters)
 CROSS JOIN LATERAL (
        SELECT count(*) AS count
          FROM (SELECT FROM {schema}.ready AS r WHERE r.queue = line.queue LIMIT line.waiters) AS head) AS found
 WHERE found.count > 0
