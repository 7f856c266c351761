-- Give jobs whose places this transaction has locked these fields ($2…, one array a field). A waiting job's place is
-- deleted and inserted anew, so that a claim with an older snapshot misses it; it keeps its place in line unless it is
-- given another time to be due ($5). Of payload, tags and metadata null leaves what there is. The returned rows tell
-- where those stand that wait.
WITH item AS MATERIALIZED (
  SELECT t.*, clock.now
    FROM (SELECT coalesce($1::timestamptz, now()) AS now) AS clock
   CROSS JOIN unnest(
           $2::uuid[], $3::text[], $4::smallint[], $5::timestamptz[], $6::float8[], $7::float8[], $8::int[],
           $9::jsonb[], $10::jsonb[], $11::bytea[], $12::bytea[], $13::timestamptz[], $14::text[])
         AS t(id, type, priority, due_at, lease_seconds, timeout_seconds, max_retries, backoff, tags, metadata, payload,
              expires_at, dead_letter_queue)
), gone_ready AS (
  DELETE FROM {schema}.ready WHERE id = ANY ($2::uuid[])
  RETURNING id, queue, attempt, noted, since, NULL::timestamptz AS run_at, 'ready' AS state
), gone_scheduled AS (
  DELETE FROM {schema}.scheduled WHERE id = ANY ($2::uuid[])
  RETURNING id, queue, attempt, noted, NULL::timestamptz AS since, run_at,
            CASE WHEN is_retry THEN 'retry' ELSE 'scheduled' END AS state
), place AS MATERIALIZED (
  SELECT item.id, item.type, item.priority, old.queue, old.attempt, old.noted, old.state AS left_state,
         CASE WHEN old.attempt = 0 THEN item.expires_at END AS expires_at,
         CASE WHEN item.due_at IS NULL THEN old.state
              WHEN item.due_at <= item.now THEN 'ready'
              WHEN old.state = 'retry' THEN 'retry'
              ELSE 'scheduled' END AS state,
         CASE WHEN item.due_at IS NULL THEN old.since ELSE item.now END AS since,
         coalesce(item.due_at, old.run_at) AS run_at
    FROM item
    JOIN (SELECT * FROM gone_ready UNION ALL SELECT * FROM gone_scheduled) AS old ON old.id = item.id
), body AS (
  UPDATE {schema}.jobs AS b
     SET (type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff, tags, metadata, payload,
          expires_at, dead_letter_queue) = (
           SELECT i.type, i.priority, coalesce(i.due_at, b.run_at), i.lease_seconds, i.timeout_seconds, i.max_retries,
                  i.backoff, coalesce(i.tags, b.tags), coalesce(i.metadata, b.metadata),
                  coalesce(i.payload, b.payload), i.expires_at, i.dead_letter_queue
             FROM item AS i
            WHERE i.id = b.id)
   WHERE b.id = ANY (ARRAY(SELECT id FROM place))
), buried AS (
  UPDATE {schema}.dead AS d
     SET (type, priority, lease_seconds, timeout_seconds, max_retries, backoff, tags, metadata, payload,
          dead_letter_queue) = (
           SELECT i.type, i.priority, i.lease_seconds, i.timeout_seconds, i.max_retries, i.backoff,
                  coalesce(i.tags, d.tags), coalesce(i.metadata, d.metadata), coalesce(i.payload, d.payload),
                  i.dead_letter_queue
             FROM item AS i
            WHERE i.id = d.id)
   WHERE d.id = ANY ($2::uuid[])
  RETURNING d.id, d.queue, d.type, d.state
), waiting AS (
  INSERT INTO {schema}.ready (id, queue, type, priority, attempt, noted, since, expires_at)
  SELECT id, queue, type, priority, attempt, noted, since, expires_at
    FROM place
   WHERE state = 'ready'
), delayed AS (
  INSERT INTO {schema}.scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry, expires_at)
  SELECT id, queue, type, priority, attempt, noted, run_at, state = 'retry', expires_at
    FROM place
   WHERE state <> 'ready'
), counted AS (
  INSERT INTO {schema}.deltas (queue, ready, scheduled, retry)
  SELECT queue,
         count(*) FILTER (WHERE state = 'ready') - count(*) FILTER (WHERE left_state = 'ready'),
         count(*) FILTER (WHERE state = 'scheduled') - count(*) FILTER (WHERE left_state = 'scheduled'),
         count(*) FILTER (WHERE state = 'retry') - count(*) FILTER (WHERE left_state = 'retry')
    FROM place
   WHERE state <> left_state
   GROUP BY queue
)
SELECT id, queue, type, left_state AS state, priority, state AS state_now, since,
       CASE WHEN state <> 'ready' THEN extract(epoch FROM run_at - coalesce($1::timestamptz, now()))::float8 END
         AS due_in_seconds
  FROM place
UNION ALL
SELECT id, queue, type, state, NULL, state, NULL, NULL FROM buried
