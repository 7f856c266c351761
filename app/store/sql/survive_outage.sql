-- Note that the reaper is at work; when nobody was for longer than $1 seconds, first give the leases that stood
-- then the lost time back (up to $2 seconds, never past an attempt's time limit): their workers could not
-- heartbeat. Measured by the database's own clock. The row's lock makes other reapers wait until this is done.
WITH before AS MATERIALIZED (
  SELECT m.ran_at FROM {schema}.maintenance AS m WHERE m.task = 'reap' FOR UPDATE
), outage AS MATERIALIZED (
  SELECT before.ran_at,
         least(extract(epoch FROM clock_timestamp() - before.ran_at), $2::float8) * interval '1 second' AS lost
    FROM before
   WHERE clock_timestamp() - before.ran_at > $1::float8 * interval '1 second'
), given AS (
  UPDATE {schema}.leases AS l
     SET expires_at = greatest(l.expires_at, least(l.expires_at + outage.lost, l.deadline_at))
    FROM outage
   WHERE l.expires_at > outage.ran_at
  RETURNING l.id
), noted AS (
  INSERT INTO {schema}.maintenance AS m (task, ran_at) VALUES ('reap', clock_timestamp())
  ON CONFLICT (task) DO UPDATE SET ran_at = excluded.ran_at
)
SELECT count(given.id)
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS unhurried
  LEFT JOIN given ON true
