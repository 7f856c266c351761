-- Lock dead jobs ($2) in one of these states ($3) and say which unique keys they had, and what decides whether they need them again. Those without
-- a key do not come back.
SELECT coalesce($1::timestamptz, now()) AS now, mine.id, mine.queue, mine.created_at, mine.unique_key,
       mine.unique_scope, mine.unique_window_seconds,
       mine.created_at + mine.unique_window_seconds * interval '1 second' AS window_ends_at,
       mine.attempt > 0 OR EXISTS (SELECT FROM {schema}.attempts AS a WHERE a.job_id = mine.id OFFSET 0) AS started
  FROM unnest($2::uuid[]) AS t(id)
 CROSS JOIN LATERAL (
        SELECT d.id, d.queue, d.created_at, d.unique_key, d.unique_scope, d.unique_window_seconds, d.attempt
          FROM {schema}.dead AS d
         WHERE d.id = t.id AND d.state = ANY ($3::text[])
           FOR UPDATE) AS mine
 WHERE mine.unique_key IS NOT NULL
