-- Whether a lease under a request's name ($2 owner, $3 name) would find anything: leases that stand under it, or ready
-- jobs in the stretches ($4 lines, $5 priorities, from $6 to $7). Nothing is locked. It is one statement, so that a twin
-- that leases at this moment is not missed: either its leases are seen, or its jobs still stand ready.
SELECT clock.now,
       EXISTS (
         SELECT FROM {schema}.lease_requests AS r
          CROSS JOIN LATERAL unnest(r.job_ids, r.lease_ids) AS t(id, lease_id)
          CROSS JOIN LATERAL (
                 SELECT FROM {schema}.leases AS l WHERE l.id = t.id AND l.lease_id = t.lease_id OFFSET 0) AS lease
          WHERE r.owner = $2::text AND r.request_id = $3::text)
       OR EXISTS (
         SELECT FROM unnest($4::text[], $5::int[], $6::timestamptz[], $7::timestamptz[])
                AS s(line, priority, since, until)
          CROSS JOIN LATERAL (
                 SELECT FROM {schema}.ready AS r
                  WHERE {line} = s.line AND r.priority = s.priority AND r.since >= s.since AND r.since <= s.until
                    AND (r.expires_at IS NULL OR r.expires_at > clock.now)
                  ORDER BY r.since
                  LIMIT 1) AS found) AS anything
  FROM (SELECT coalesce($1::timestamptz, now()) AS now OFFSET 0) AS clock
