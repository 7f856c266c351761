-- Note what was decided of schedules that are locked, one fire of each. What has been decided before is left out of
-- the answer: it has had its job.
INSERT INTO {schema}.schedule_runs (schedule, fire_at, triggered, decided_at, outcome, reason, fires, job_id)
SELECT r.schedule, r.fire_at, false, $1::timestamptz, r.outcome, r.reason, r.fires, r.job_id
  FROM unnest($2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::int[], $7::uuid[])
       AS r(schedule, fire_at, outcome, reason, fires, job_id)
ON CONFLICT (schedule, fire_at, triggered) DO NOTHING
RETURNING schedule
