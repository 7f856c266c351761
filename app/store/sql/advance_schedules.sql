-- Let schedules that are locked go on to their next fire; $3 are the jobs that they have got, null for none.
UPDATE {schema}.schedules AS s
   SET next_fire_at = n.next_fire_at,
       job_ids = CASE WHEN n.job_id IS NULL THEN s.job_ids
                      ELSE (s.job_ids || n.job_id)[greatest(1, cardinality(s.job_ids) + 2 - $4::int):] END
  FROM unnest($1::text[], $2::timestamptz[], $3::uuid[]) AS n(name, next_fire_at, job_id)
 WHERE s.name = n.name
