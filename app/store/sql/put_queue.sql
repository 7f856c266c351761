-- Give a queue a policy, and pause it or not; null leaves it as it is, a new queue open.
INSERT INTO {schema}.queues AS q (name, policy, paused, created_at)
VALUES ($2::text, $3::jsonb, coalesce($4::boolean, false), coalesce($1::timestamptz, now()))
ON CONFLICT (name) DO UPDATE SET policy = excluded.policy, paused = coalesce($4::boolean, q.paused)
RETURNING q.paused, q.xmax = 0 AS created
