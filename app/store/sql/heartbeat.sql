-- Extend leases: to the later of their present end and now plus $4 (or the lease's own length), never past the
-- attempt's time limit. A lease stands until the reaper takes it, so one that has run out may be extended too.
WITH beat AS MATERIALIZED (
  SELECT mine.id,
         greatest(mine.expires_at,
                  least(clock.now + coalesce(t.extend_seconds, mine.lease_seconds) * interval '1 second',
                        mine.deadline_at)) AS expires_at,
         clock.now
    FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
   CROSS JOIN unnest($2::uuid[], $3::uuid[], $4::float8[]) AS t(id, lease_id, extend_seconds)
   CROSS JOIN LATERAL (
          SELECT l.id, l.expires_at, l.lease_seconds, l.deadline_at
            FROM {schema}.leases AS l
           WHERE l.id = t.id AND l.lease_id = t.lease_id
             FOR UPDATE {or_pass}) AS mine
)
UPDATE {schema}.leases AS l
   SET (expires_at, heartbeat_at) = (SELECT beat.expires_at, beat.now FROM beat WHERE beat.id = l.id)
 WHERE l.id = ANY (ARRAY(SELECT id FROM beat))
RETURNING l.id, l.expires_at, l.cancel_requested
