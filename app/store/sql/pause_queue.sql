-- Let leases pass a queue over ($3), or not any more, and make it where nobody has yet.
INSERT INTO {schema}.queues AS q (name, paused, created_at)
VALUES ($2::text, $3::boolean, coalesce($1::timestamptz, now()))
ON CONFLICT (name) DO UPDATE SET paused = excluded.paused
RETURNING q.policy
