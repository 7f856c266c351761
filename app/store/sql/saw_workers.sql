-- Note who has been heard of since the last time: $2 names in order, $3 the queues and $4 the types that their leases ask
-- for, no queues where only heartbeats came. Its COMMIT need not wait for the disk: what a crash takes back is seen again.
INSERT INTO {schema}.workers AS w (name, queues, types, directive, first_seen_at, last_seen_at)
SELECT t.name, t.queues, t.types, 'continue', clock.now, clock.now
  FROM (SELECT set_config('synchronous_commit', 'off', true), coalesce($1::timestamptz, now()) AS now) AS clock
 CROSS JOIN unnest($2::text[], $3::jsonb[], $4::jsonb[]) AS t(name, queues, types)
ON CONFLICT (name) DO UPDATE
   SET queues = CASE WHEN excluded.queues = '[]' THEN w.queues ELSE excluded.queues END,
       types = CASE WHEN excluded.queues = '[]' THEN w.types ELSE excluded.types END,
       last_seen_at = greatest(w.last_seen_at, excluded.last_seen_at)
RETURNING w.xmax = 0 AS is_new
