-- Look at the next $4 jobs of a place after the id $2 and up to $3, and lock those of a queue ($1): first half of a step of
-- purge, for places without an index by queue. Who holds one at this moment is waited for; most often the job has
-- gone elsewhere then. There is always one row.
WITH head AS MATERIALIZED (
  SELECT p.ctid AS tid, p.id, p.queue = $1::text AS wanted
    FROM {schema}.{place} AS p
   WHERE p.id > $2::uuid AND p.id <= $3::uuid
   ORDER BY p.id
   LIMIT $4::int
), mine AS MATERIALIZED (
  SELECT locked.id
    FROM head
   CROSS JOIN LATERAL (SELECT p.id FROM {schema}.{place} AS p WHERE p.ctid = head.tid FOR UPDATE) AS locked
   WHERE head.wanted
)
SELECT mine.id, head.seen, head.wanted, (SELECT id FROM head ORDER BY id DESC LIMIT 1) AS next
  FROM (SELECT count(*) AS seen, count(*) FILTER (WHERE wanted) AS wanted FROM head) AS head
  LEFT JOIN mine ON true
