-- What an edit has to know of jobs ($2) whose places this transaction has locked.
SELECT coalesce($1::timestamptz, now()) AS now, b.id, b.queue, b.type, b.priority, b.run_at, b.lease_seconds,
       b.timeout_seconds, b.max_retries, b.backoff, b.expires_at, b.dead_letter_queue
  FROM {schema}.jobs AS b WHERE b.id = ANY ($2::uuid[])
UNION ALL
SELECT coalesce($1::timestamptz, now()), d.id, d.queue, d.type, d.priority, d.run_at, d.lease_seconds,
       d.timeout_seconds, d.max_retries, d.backoff, d.expires_at, d.dead_letter_queue
  FROM {schema}.dead AS d WHERE d.id = ANY ($2::uuid[])
