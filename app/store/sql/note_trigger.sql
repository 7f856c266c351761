-- Note that somebody has triggered a schedule that is locked. Two at one instant are a microsecond apart.
INSERT INTO {schema}.schedule_runs (schedule, fire_at, triggered, decided_at, outcome, reason, fires, job_id)
SELECT $2::text, coalesce(max(r.fire_at) + interval '1 microsecond', clock.now), true, clock.now, $3::text, $4::text,
       1, $5::uuid
  FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
  LEFT JOIN {schema}.schedule_runs AS r ON r.schedule = $2::text AND r.triggered AND r.fire_at >= clock.now
 GROUP BY clock.now
