-- Change a schedule that is locked.
UPDATE {schema}.schedules
   SET definition = $2::jsonb, payload = $3::bytea, paused = $4::bool, created_at = $5::timestamptz,
       anchored_at = $6::timestamptz, next_fire_at = $7::timestamptz, job_ids = $8::uuid[]
 WHERE name = $1::text
