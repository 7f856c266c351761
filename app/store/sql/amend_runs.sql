-- Say what came of runs that were noted in the same transaction, when it was otherwise than was to be expected.
UPDATE {schema}.schedule_runs AS r
   SET outcome = a.outcome, reason = a.reason, job_id = a.job_id
  FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::uuid[])
       AS a(schedule, fire_at, outcome, reason, job_id)
 WHERE r.schedule = a.schedule AND r.fire_at = a.fire_at AND NOT r.triggered
