-- Finish jobs: the lease named is the fence. No row comes back for a lease that does not stand any more; nor for one
-- whose job has got its first note since this statement began, which can not see it: the caller asks again. Of some
-- queues ($5) history keeps no payload, tags or metadata. With follow-ups, $6 says which jobs they are.
WITH held AS MATERIALIZED (
  SELECT mine.*, t.result, t.place
    FROM unnest($2::uuid[], $3::uuid[], $4::bytea[]) WITH ORDINALITY AS t(id, lease_id, result, place)
   CROSS JOIN LATERAL (
          SELECT l.*
            FROM {schema}.leases AS l
           WHERE l.id = t.id AND l.lease_id = t.lease_id
             FOR UPDATE {or_pass}) AS mine
), lease AS MATERIALIZED (
  SELECT held.*
    FROM held
   WHERE NOT held.noted OR EXISTS (SELECT FROM {schema}.notes AS n WHERE n.job_id = held.id)
), gone AS (
  DELETE FROM {schema}.leases WHERE id = ANY (ARRAY(SELECT id FROM lease))
), body AS (
  DELETE FROM {schema}.jobs WHERE id = ANY (ARRAY(SELECT id FROM lease)) RETURNING {body}
), note AS (
  DELETE FROM {schema}.notes
   WHERE job_id = ANY (ARRAY(SELECT id FROM lease WHERE noted)) RETURNING job_id, last_error
), done AS (
  INSERT INTO {schema}.history
         ({body}, lease_id, attempt, last_error, worker, started_at, finished_at, result{then})
  SELECT {kept}, lease.lease_id, lease.attempt, note.last_error, lease.worker, lease.leased_at,
         coalesce($1::timestamptz, now()), lease.result{then_value}
    FROM lease
    JOIN body ON body.id = lease.id
    LEFT JOIN note ON note.job_id = lease.id
  RETURNING *
), counted AS (
  INSERT INTO {schema}.deltas (queue, active, completed)
  SELECT queue, -count(*), count(*) FROM lease GROUP BY queue
)
SELECT {shown}
  FROM done
