-- Lock leases that have run out since $3, the longest overdue first, with what decides about their jobs. First half
-- of reap; a lease that its worker or another reaper holds at this moment is left to them. There is always one row.
SELECT clock.now, overdue.*, body.max_retries, body.budget_start, body.backoff,
       body.dead_letter_queue, body.source
  FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
  LEFT JOIN (
        SELECT l.*
          FROM {schema}.leases AS l
         WHERE l.expires_at >= $3::timestamptz AND l.expires_at <= coalesce($1::timestamptz, now())
         ORDER BY l.expires_at
         LIMIT $2::int
           FOR UPDATE SKIP LOCKED) AS overdue ON true
  LEFT JOIN LATERAL (
        SELECT b.max_retries, b.budget_start, b.backoff, b.dead_letter_queue, b.source
          FROM {schema}.jobs AS b
         WHERE b.id = overdue.id
        OFFSET 0) AS body ON true
