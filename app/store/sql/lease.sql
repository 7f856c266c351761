-- Take up to $3 jobs that are ready on the lines ($2 queues, with $9 types where the lease names types), in the
-- order of priority, then of the time each became ready. The first job taken gets the first of the slots ($5 lease
-- ids, $6 lengths in seconds or null, $7 workers), and so on: several requests may share one claim.
--
-- `candidate` only reads: the head of each line at each level of priority, merged. It takes $4 more than asked, so
-- that what other claims have locked at this moment can be passed over. `taken` locks one by one and stops at the
-- limit: what is not handed out is not kept from other claims (but for what no reply has room for, until the
-- COMMIT). Rows of `ready` are never updated, so their ctid stays theirs for the length of this statement.
-- A reply stops before $8 bytes of payload, though never before its first job.
-- There is always one row: `seen` tells an empty line from a line that others hold at this moment.
WITH candidate AS MATERIALIZED (
  SELECT head.tid, level.priority, head.since
    FROM generate_series(10, 0, -1) AS level(priority)
   CROSS JOIN LATERAL (
          SELECT probe.tid, probe.since
            FROM {lines}
           CROSS JOIN LATERAL (
                  SELECT r.ctid AS tid, r.since
                    FROM {schema}.ready AS r
                   WHERE {same_line} AND r.priority = level.priority
                   ORDER BY r.since
                   LIMIT $3::int + $4::int) AS probe
           ORDER BY probe.since
           LIMIT $3::int + $4::int) AS head
   LIMIT $3::int + $4::int
), taken AS MATERIALIZED (
  SELECT mine.*
    FROM (SELECT tid FROM candidate ORDER BY priority DESC, since) AS ordered
   CROSS JOIN LATERAL (
          SELECT r.ctid AS tid, r.*
            FROM {schema}.ready AS r
           WHERE r.ctid = ordered.tid
             FOR UPDATE SKIP LOCKED) AS mine
   LIMIT $3::int
), sized AS MATERIALIZED (
  SELECT taken.tid, taken.since, taken.attempt, taken.noted, body.*,
         sum(octet_length(body.payload)) OVER (ORDER BY taken.priority DESC, taken.since, taken.id) AS bytes,
         row_number() OVER (ORDER BY taken.priority DESC, taken.since, taken.id) AS place
    FROM taken
   CROSS JOIN LATERAL (
          SELECT b.id, b.queue, b.type, b.priority, b.max_retries, b.lease_seconds, b.timeout_seconds,
                 b.created_at, b.run_at, b.traceparent, b.tags, b.metadata, b.payload
            FROM {schema}.jobs AS b
           WHERE b.id = taken.id
          OFFSET 0) AS body
), chosen AS MATERIALIZED (
  SELECT sized.*, ($5::uuid[])[sized.place] AS lease_id, ($7::text[])[sized.place] AS worker, clock.now AS leased_at,
         length.seconds AS lease_length_seconds,
         clock.now + sized.timeout_seconds * interval '1 second' AS deadline_at,
         clock.now + least(length.seconds, sized.timeout_seconds) * interval '1 second' AS expires_at
    FROM sized
   CROSS JOIN (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
   CROSS JOIN LATERAL (SELECT coalesce(($6::float8[])[sized.place], sized.lease_seconds) AS seconds) AS length
   WHERE sized.place = 1 OR sized.bytes <= $8::bigint
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
       chosen.id, chosen.queue, chosen.type, chosen.payload, chosen.attempt + 1 AS attempt, chosen.max_retries,
       chosen.priority, chosen.lease_id, chosen.leased_at, chosen.expires_at, chosen.since, chosen.created_at,
       chosen.run_at, chosen.tags, chosen.metadata, chosen.traceparent, note.last_error
  FROM (VALUES (1)) AS always(row)
  LEFT JOIN chosen ON true
  LEFT JOIN LATERAL (
         SELECT n.last_error
           FROM {schema}.notes AS n
          WHERE chosen.noted AND n.job_id = chosen.id
         OFFSET 0) AS note ON true
 ORDER BY chosen.place
