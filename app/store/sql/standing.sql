-- Those of these leases ($1 jobs, $2 lease ids) that stand, as their claim has returned them, in the same order.
SELECT lease.id, lease.queue, lease.type, body.payload, lease.attempt, body.max_retries, lease.priority,
       lease.lease_id, lease.leased_at, lease.expires_at, lease.since, body.created_at, body.run_at, body.tags,
       body.metadata, body.traceparent, body.source, note.last_error, note.checkpoint
  FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS t(id, lease_id, place)
 CROSS JOIN LATERAL (
        SELECT l.* FROM {schema}.leases AS l WHERE l.id = t.id AND l.lease_id = t.lease_id OFFSET 0) AS lease
 CROSS JOIN LATERAL (SELECT b.* FROM {schema}.jobs AS b WHERE b.id = lease.id OFFSET 0) AS body
  LEFT JOIN LATERAL (
        SELECT n.last_error, n.checkpoint
          FROM {schema}.notes AS n
         WHERE lease.noted AND n.job_id = lease.id
        OFFSET 0) AS note ON true
 ORDER BY t.place
