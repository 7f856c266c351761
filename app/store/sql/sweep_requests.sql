-- Forget up to $2 idempotency keys, and as many requests for leases, that are older than $3 seconds, the oldest first.
WITH old_call AS MATERIALIZED (
  SELECT i.ctid AS tid
    FROM {schema}.idempotency_keys AS i
   WHERE i.created_at <= coalesce($1::timestamptz, now()) - $3::float8 * interval '1 second'
   ORDER BY i.created_at
   LIMIT $2::int
     FOR UPDATE SKIP LOCKED
), call AS (
  DELETE FROM {schema}.idempotency_keys WHERE ctid = ANY (ARRAY(SELECT tid FROM old_call)) RETURNING 1
), old_lease AS MATERIALIZED (
  SELECT r.ctid AS tid
    FROM {schema}.lease_requests AS r
   WHERE r.created_at <= coalesce($1::timestamptz, now()) - $3::float8 * interval '1 second'
   ORDER BY r.created_at
   LIMIT $2::int
     FOR UPDATE SKIP LOCKED
), lease AS (
  DELETE FROM {schema}.lease_requests WHERE ctid = ANY (ARRAY(SELECT tid FROM old_lease)) RETURNING 1
)
SELECT (SELECT count(*) FROM call) + (SELECT count(*) FROM lease) AS count
