-- Let go of unique keys ($2) of a queue ($1) that these jobs ($3) have taken with them to another one.
DELETE FROM {schema}.unique_keys AS u
 WHERE u.queue = $1::text AND u.key = ANY ($2::text[]) AND u.job_id = ANY ($3::uuid[])
