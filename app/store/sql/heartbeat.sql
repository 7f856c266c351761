-- Extend leases: to the later of their present end and now plus $4 (or the lease's own length), never past the
-- attempt's time limit. A lease stands until the reaper takes it, so one that has run out may be extended too.
-- What a worker tells beside ($5 progress in percent, $6 in words, $7 checkpoint) is noted: a progress replaces the one
-- before, a checkpoint likewise.
WITH beat AS MATERIALIZED (
  SELECT mine.id,
         greatest(mine.expires_at,
                  least(clock.now + coalesce(t.extend_seconds, mine.lease_seconds) * interval '1 second',
                        mine.deadline_at)) AS expires_at,
         clock.now, t.percent, t.message, t.checkpoint,
         num_nonnulls(t.percent, t.message, t.checkpoint) > 0 AS tells
    FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
   CROSS JOIN unnest($2::uuid[], $3::uuid[], $4::float8[], $5::float8[], $6::text[], $7::bytea[])
         AS t(id, lease_id, extend_seconds, percent, message, checkpoint)
   CROSS JOIN LATERAL (
          SELECT l.id, l.expires_at, l.lease_seconds, l.deadline_at
            FROM {schema}.leases AS l
           WHERE l.id = t.id AND l.lease_id = t.lease_id
             FOR UPDATE {or_pass}) AS mine
), note AS (
  INSERT INTO {schema}.notes AS n (job_id, progress_percent, progress_message, checkpoint)
  SELECT id, percent, message, checkpoint
    FROM beat
   WHERE tells
  ON CONFLICT (job_id) DO UPDATE
     SET (progress_percent, progress_message) = (
           SELECT p.percent, p.message
             FROM (VALUES (excluded.progress_percent, excluded.progress_message),
                          (n.progress_percent, n.progress_message)) AS p(percent, message)
            WHERE num_nonnulls(p.percent, p.message) > 0
            LIMIT 1),
         checkpoint = coalesce(excluded.checkpoint, n.checkpoint)
)
UPDATE {schema}.leases AS l
   SET (expires_at, heartbeat_at, noted) =
       (SELECT beat.expires_at, beat.now, l.noted OR beat.tells FROM beat WHERE beat.id = l.id)
 WHERE l.id = ANY (ARRAY(SELECT id FROM beat))
RETURNING l.id, l.expires_at, l.cancel_requested, l.queue, l.type, l.worker
