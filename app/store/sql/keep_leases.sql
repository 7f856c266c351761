-- Keep what was leased under a request's name ($2 owner, $3 name), for its replay. Last step of a lease with a request id.
UPDATE {schema}.lease_requests
   SET job_ids = $4::uuid[], lease_ids = $5::uuid[], created_at = coalesce($1::timestamptz, now())
 WHERE owner = $2::text AND request_id = $3::text
