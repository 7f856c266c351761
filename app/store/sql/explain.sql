-- How the job $2 stands, and all that may keep it from running, in one snapshot. The stretches ($3 lines, $4 priorities,
-- from $5 to $6) are those of its queue: what stands before it in them is counted up to $7. A worker asks for such jobs
-- when it was heard of in the last $8 seconds. No row comes back when there is no such job.
WITH clock AS MATERIALIZED (
  SELECT coalesce($1::timestamptz, now()) AS now
), place AS MATERIALIZED (
  SELECT 'ready' AS state, r.id, r.queue, r.type, r.priority, r.attempt, r.noted, r.since,
         NULL::timestamptz AS run_at, r.expires_at, NULL::text AS worker, NULL::timestamptz AS leased_at,
         NULL::timestamptz AS heartbeat_at, NULL::timestamptz AS lease_expires_at, NULL::timestamptz AS deadline_at,
         false AS cancel_requested, NULL::text AS reason, NULL::text AS error_type, NULL::timestamptz AS finished_at
    FROM {schema}.ready AS r
   WHERE r.id = $2::uuid
  UNION ALL
  SELECT 'held', w.id, w.queue, w.type, w.priority, w.attempt, w.noted, w.since,
         NULL, w.expires_at, NULL, NULL, NULL, NULL, NULL, false, NULL, NULL, NULL
    FROM {schema}.held AS w
   WHERE w.id = $2::uuid
  UNION ALL
  SELECT CASE WHEN s.is_retry THEN 'retry' ELSE 'scheduled' END, s.id, s.queue, s.type, s.priority, s.attempt, s.noted,
         NULL, s.run_at, s.expires_at, NULL, NULL, NULL, NULL, NULL, false, NULL, NULL, NULL
    FROM {schema}.scheduled AS s
   WHERE s.id = $2::uuid
  UNION ALL
  SELECT 'active', l.id, l.queue, l.type, l.priority, l.attempt, l.noted,
         NULL, NULL, NULL, l.worker, l.leased_at, l.heartbeat_at, l.expires_at, l.deadline_at, l.cancel_requested,
         NULL, NULL, NULL
    FROM {schema}.leases AS l
   WHERE l.id = $2::uuid
  UNION ALL
  SELECT d.state, d.id, d.queue, d.type, d.priority, d.attempt, false,
         NULL, NULL, d.expires_at, d.worker, NULL, NULL, NULL, NULL, false, d.reason, d.error_type, d.finished_at
    FROM {schema}.dead AS d
   WHERE d.id = $2::uuid
  UNION ALL
  SELECT 'completed', h.id, h.queue, h.type, h.priority, h.attempt, false,
         NULL, NULL, NULL, h.worker, NULL, NULL, NULL, NULL, false, NULL, NULL, h.finished_at
    FROM {schema}.history AS h
   WHERE h.id = $2::uuid
), before AS MATERIALIZED (
  SELECT count(*) AS jobs
    FROM (SELECT
            FROM place
           CROSS JOIN unnest($3::text[], $4::int[], $5::timestamptz[], $6::timestamptz[])
                 AS stretch(line, priority, since, until)
           CROSS JOIN LATERAL (
                  SELECT
                    FROM {schema}.ready AS r
                   WHERE r.queue = stretch.line AND r.priority = stretch.priority AND r.since >= stretch.since
                     AND r.since <= CASE WHEN stretch.priority > place.priority THEN stretch.until
                                         ELSE least(stretch.until, place.since - interval '1 microsecond') END
                   LIMIT $7::int) AS one
           WHERE place.state = 'ready' AND stretch.line = place.queue AND stretch.priority >= place.priority
           LIMIT $7::int) AS counted
), asking AS MATERIALIZED (
  SELECT count(*) FILTER (WHERE w.last_seen_at > clock.now - $8::float8 * interval '1 second') AS workers,
         count(*) FILTER (WHERE w.last_seen_at > clock.now - $8::float8 * interval '1 second'
                            AND w.directive = 'continue') AS willing,
         max(w.last_seen_at) AS last_seen_at,
         (array_agg(w.name ORDER BY w.last_seen_at DESC, w.name))[1] AS last_worker
    FROM place
   CROSS JOIN clock
    JOIN {schema}.workers AS w ON w.queues ? place.queue AND (w.types IS NULL OR w.types ? place.type)
)
SELECT clock.now, place.*, body.max_retries, body.budget_start, note.error_type AS noted_error_type,
       before.jobs AS ahead, asking.workers, asking.willing, asking.last_seen_at, asking.last_worker,
       EXISTS (SELECT FROM {schema}.queues AS q WHERE q.name = place.queue AND q.paused) AS paused,
       (SELECT extract(epoch FROM clock_timestamp() - m.ran_at)::float8
          FROM {schema}.maintenance AS m
         WHERE m.task = 'reap') AS maintained_seconds_ago
  FROM place
 CROSS JOIN clock
 CROSS JOIN before
 CROSS JOIN asking
  LEFT JOIN LATERAL (
         SELECT b.max_retries, b.budget_start
           FROM {schema}.jobs AS b
          WHERE b.id = place.id
         OFFSET 0) AS body ON true
  LEFT JOIN LATERAL (
         SELECT n.error_type
           FROM {schema}.notes AS n
          WHERE place.noted AND n.job_id = place.id
         OFFSET 0) AS note ON true
