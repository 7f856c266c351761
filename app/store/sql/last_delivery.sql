-- How often the leases under a request's name ($1 owner, $2 name) were handed out, and keep others from doing so until
-- this transaction ends.
SELECT r.delivery
  FROM {schema}.lease_requests AS r
 WHERE r.owner = $1::text AND r.request_id = $2::text
   FOR UPDATE
