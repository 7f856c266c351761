-- Create a schedule, unless another has come first; the next statement sees that one.
INSERT INTO {schema}.schedules
       (name, definition, payload, paused, created_at, anchored_at, next_fire_at, job_ids)
VALUES ($1::text, $2::jsonb, $3::bytea, $4::bool, $5::timestamptz, $6::timestamptz, $7::timestamptz, $8::uuid[])
ON CONFLICT (name) DO NOTHING
RETURNING name
