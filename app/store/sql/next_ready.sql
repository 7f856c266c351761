-- The first $5 ready jobs of a queue ($1) at one priority ($2), ready from $3 to $4, for a step of purge. There is always
-- one row.
WITH head AS MATERIALIZED (
  SELECT r.id, r.since
    FROM {schema}.ready AS r
   WHERE r.queue = $1::text AND r.priority = $2::int AND r.since >= $3::timestamptz AND r.since <= $4::timestamptz
   ORDER BY r.since
   LIMIT $5::int
)
SELECT head.id, seen.seen, seen.next
  FROM (SELECT count(*) AS seen, max(since) AS next FROM head) AS seen
  LEFT JOIN head ON true
