-- Lock the leases that workers give up, with what decides about their jobs. First half of fail and release: the
-- locks are held until `conclude` has written the verdicts in the same transaction.
SELECT coalesce($1::timestamptz, now()) AS now, mine.*, body.max_retries, body.budget_start, body.backoff,
       body.dead_letter_queue, body.source
  FROM unnest($2::uuid[], $3::uuid[]) WITH ORDINALITY AS t(id, lease_id, place)
 CROSS JOIN LATERAL (
        SELECT l.*
          FROM {schema}.leases AS l
         WHERE l.id = t.id AND l.lease_id = t.lease_id
           FOR UPDATE {or_pass}) AS mine
 CROSS JOIN LATERAL (
        SELECT b.max_retries, b.budget_start, b.backoff, b.dead_letter_queue, b.source
          FROM {schema}.jobs AS b
         WHERE b.id = mine.id
        OFFSET 0) AS body
