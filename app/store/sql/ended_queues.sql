-- The next $2 queues after $1, by their names, that keep jobs that have ended.
SELECT c.queue
  FROM {schema}.counts AS c
 WHERE c.queue > $1::text AND c.completed + c.failed + c.cancelled + c.expired > 0
 ORDER BY c.queue
 LIMIT $2::int
