-- The leases of these ids, as their claim would have returned them: asked when the connection died at its COMMIT.
SELECT lease.id, lease.queue, lease.type, body.payload, lease.attempt, body.max_retries, lease.priority,
       lease.lease_id, lease.leased_at, lease.expires_at, lease.since, body.created_at, body.run_at, body.tags,
       body.metadata, body.traceparent, body.source, note.last_error, note.checkpoint
  FROM {schema}.leases AS lease
 CROSS JOIN LATERAL (SELECT b.* FROM {schema}.jobs AS b WHERE b.id = lease.id OFFSET 0) AS body
  LEFT JOIN LATERAL (
         SELECT n.last_error, n.checkpoint
           FROM {schema}.notes AS n
          WHERE lease.noted AND n.job_id = lease.id
         OFFSET 0) AS note ON true
 WHERE lease.lease_id = ANY ($1::uuid[])
 ORDER BY array_position($1::uuid[], lease.lease_id)
