-- The first ready jobs of each stretch ($1 lines, $2 priorities, from $3 to $4), at most $5 of each: looked at, not
-- taken. What is past its start deadline is not seen.
SELECT s.stretch, found.since
  FROM unnest($1::text[], $2::int[], $3::timestamptz[], $4::timestamptz[], $5::int[])
       WITH ORDINALITY AS s(line, priority, since, until, most, stretch)
 CROSS JOIN LATERAL (
        SELECT r.since
          FROM {schema}.ready AS r
         WHERE {line} = s.line AND r.priority = s.priority AND r.since >= s.since AND r.since <= s.until
           AND (r.expires_at IS NULL OR r.expires_at > coalesce($6::timestamptz, now()))
         ORDER BY r.since
         LIMIT s.most) AS found
