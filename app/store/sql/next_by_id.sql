-- Look at the next $4 jobs of a place after the id $2 and up to $3; those of a queue ($1) come back. For a step of purge, in
-- places without an index by queue. There is always one row.
WITH head AS MATERIALIZED (
  SELECT p.id, p.queue = $1::text AS wanted
    FROM {schema}.{place} AS p
   WHERE p.id > $2::uuid AND p.id <= $3::uuid
   ORDER BY p.id
   LIMIT $4::int
)
SELECT head.id, seen.seen, seen.next
  FROM (SELECT count(*) AS seen, (SELECT id FROM head ORDER BY id DESC LIMIT 1) AS next FROM head) AS seen
  LEFT JOIN head ON head.wanted
