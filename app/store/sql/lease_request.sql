-- Note that a lease was asked for under the name $3 (owner $2), or has been before: then one delivery more. Who asks at
-- the same time waits for the row, and sees what was leased. First step of a lease with a request id.
INSERT INTO {schema}.lease_requests AS r (owner, request_id, job_ids, lease_ids, delivery, created_at)
VALUES ($2::text, $3::text, '{}', '{}', 1, coalesce($1::timestamptz, now()))
ON CONFLICT (owner, request_id) DO UPDATE SET delivery = r.delivery + 1
RETURNING r.job_ids, r.lease_ids, r.delivery
