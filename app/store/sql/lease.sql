-- Take up to $6 jobs that are ready in the stretches ($2 lines, $3 priorities, from $4 to $5), in the order of priority,
-- then of the time each became ready. The first job taken gets the first of the slots ($8 lease ids, $9 lengths in
-- seconds or null, $10 workers), and so on: several requests may share one claim.
--
-- `candidate` only reads: the heads of the stretches, merged level by level. It takes $7 more than asked, so that
-- what other claims have locked at this moment can be passed over. `taken` locks one by one and stops at the
-- limit: what is not handed out is not kept from other claims (but for what no reply has room for, until the
-- COMMIT). Rows of `ready` are never updated, so their ctid stays theirs for the length of this statement.
-- What is past its start deadline is seen by nobody: `expire` takes it away.
-- A reply stops before $11 bytes of payloads and checkpoints, though never before its first job.
-- There is always one row: `seen` tells an empty line from a line that others hold at this moment, and `passed_…` where
-- the first job stands, at each priority, that was seen and not taken.
WITH candidate AS MATERIALIZED (
  SELECT head.tid, level.priority, head.since
    FROM generate_series(10, 0, -1) AS level(priority)
   CROSS JOIN LATERAL (
          SELECT probe.tid, probe.since
            FROM unnest($2::text[], $3::int[], $4::timestamptz[], $5::timestamptz[])
                 AS stretch(line, priority, since, until)
           CROSS JOIN LATERAL (
                  SELECT r.ctid AS tid, r.since
                    FROM {schema}.ready AS r
                   WHERE {line} = stretch.line AND r.priority = stretch.priority
                     AND r.since >= stretch.since AND r.since <= stretch.until
                     AND (r.expires_at IS NULL OR r.expires_at > coalesce($1::timestamptz, now()))
                   ORDER BY r.since
                   LIMIT $6::int + $7::int) AS probe
           WHERE stretch.priority = level.priority
           ORDER BY probe.since
           LIMIT $6::int + $7::int) AS head
   LIMIT $6::int + $7::int
), taken AS MATERIALIZED (
  SELECT mine.*
    FROM (SELECT tid FROM candidate ORDER BY priority DESC, since) AS ordered
   CROSS JOIN LATERAL (
          SELECT r.ctid AS tid, r.*
            FROM {schema}.ready AS r
           WHERE r.ctid = ordered.tid
             FOR UPDATE SKIP LOCKED) AS mine
   LIMIT $6::int
), passed AS MATERIALIZED (
  SELECT priority, min(since) AS since
    FROM candidate
   WHERE NOT EXISTS (SELECT FROM taken WHERE taken.tid = candidate.tid)
   GROUP BY priority
), sized AS MATERIALIZED (
  SELECT taken.tid, taken.since, taken.attempt, taken.noted, body.*, note.*,
         sum(octet_length(body.payload) + coalesce(octet_length(note.checkpoint), 0)) OVER (ORDER BY taken.priority DESC, taken.since, taken.id) AS bytes,
         row_number() OVER (ORDER BY taken.priority DESC, taken.since, taken.id) AS place
    FROM taken
   CROSS JOIN LATERAL (
          SELECT b.id, b.queue, b.type, b.priority, b.max_retries, b.lease_seconds, b.timeout_seconds,
                 b.created_at, b.run_at, b.traceparent, b.tags, b.metadata, b.source, b.payload
            FROM {schema}.jobs AS b
           WHERE b.id = taken.id
          OFFSET 0) AS body
    LEFT JOIN LATERAL (
          SELECT n.last_error, n.checkpoint
            FROM {schema}.notes AS n
           WHERE taken.noted AND n.job_id = taken.id
          OFFSET 0) AS note ON true
), chosen AS MATERIALIZED (
  SELECT sized.*, ($8::uuid[])[sized.place] AS lease_id, ($10::text[])[sized.place] AS worker, clock.now AS leased_at,
         length.seconds AS lease_length_seconds,
         clock.now + sized.timeout_seconds * interval '1 second' AS deadline_at,
         clock.now + least(length.seconds, sized.timeout_seconds) * interval '1 second' AS expires_at
    FROM sized
   CROSS JOIN (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
   CROSS JOIN LATERAL (SELECT coalesce(($9::float8[])[sized.place], sized.lease_seconds) AS seconds) AS length
   WHERE sized.place = 1 OR sized.bytes <= $11::bigint
), gone AS (
  DELETE FROM {schema}.ready WHERE ctid = ANY (ARRAY(SELECT tid FROM chosen))
), leased AS (
  INSERT INTO {schema}.leases
         (id, queue, type, priority, attempt, noted, lease_id, since, leased_at, expires_at, deadline_at,
          lease_seconds, worker, cancel_requested)
  SELECT id, queue, type, priority, attempt + 1, noted, lease_id, since, leased_at, expires_at, deadline_at,
         lease_length_seconds, worker, false
    FROM chosen
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, active)
  SELECT queue, -count(*), count(*) FROM chosen GROUP BY queue
)
SELECT (SELECT count(*) FROM candidate) AS seen,
       ARRAY(SELECT priority FROM passed ORDER BY priority) AS passed_priorities,
       ARRAY(SELECT since FROM passed ORDER BY priority) AS passed_since, coalesce($1::timestamptz, now()) AS now,
       chosen.id, chosen.queue, chosen.type, chosen.payload, chosen.attempt + 1 AS attempt, chosen.max_retries,
       chosen.priority, chosen.lease_id, chosen.leased_at, chosen.expires_at, chosen.since, chosen.created_at,
       chosen.run_at, chosen.tags, chosen.metadata, chosen.traceparent, chosen.source, chosen.last_error,
       chosen.checkpoint
  FROM (VALUES (1)) AS always(row)
  LEFT JOIN chosen ON true
 ORDER BY chosen.place
