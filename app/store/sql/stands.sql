-- Whether a lease stands: looked at, not locked.
SELECT l.id FROM {schema}.leases AS l WHERE l.id = $1::uuid AND l.lease_id = $2::uuid
