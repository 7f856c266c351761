-- Lock the first $5 ready jobs of a queue ($1) at one priority ($2), ready from $3 to $4: first half of a step of purge.
-- Who holds one at this moment is waited for; most often the job has gone elsewhere then. There is always one row.
WITH head AS MATERIALIZED (
  SELECT r.ctid AS tid, r.since
    FROM {schema}.ready AS r
   WHERE r.queue = $1::text AND r.priority = $2::int AND r.since >= $3::timestamptz AND r.since <= $4::timestamptz
   ORDER BY r.since
   LIMIT $5::int
), mine AS MATERIALIZED (
  SELECT locked.id
    FROM head
   CROSS JOIN LATERAL (SELECT r.id FROM {schema}.ready AS r WHERE r.ctid = head.tid FOR UPDATE) AS locked
)
SELECT mine.id, head.seen, head.seen AS wanted, head.next
  FROM (SELECT count(*) AS seen, max(since) AS next FROM head) AS head
  LEFT JOIN mine ON true
