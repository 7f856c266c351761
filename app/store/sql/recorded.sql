-- How attempts ended, by their leases ($1 job ids, $2 lease ids), for repeats of the verbs that ended them. Acks are
-- kept in history.
SELECT a.job_id, a.verb, a.state, a.run_at, NULL::uuid[] AS follow_ups
  FROM unnest($1::uuid[], $2::uuid[]) AS t(job_id, lease_id)
 CROSS JOIN LATERAL (
        SELECT x.job_id, x.verb, x.state, x.run_at
          FROM {schema}.attempts AS x
         WHERE x.job_id = t.job_id AND x.lease_id = t.lease_id
        OFFSET 0) AS a
UNION ALL
SELECT h.id, 'ack', 'completed', NULL, h.follow_ups
  FROM unnest($1::uuid[], $2::uuid[]) AS t(job_id, lease_id)
 CROSS JOIN LATERAL (
        SELECT x.id, x.follow_ups
          FROM {schema}.history AS x
         WHERE x.id = t.job_id AND x.lease_id = t.lease_id
        OFFSET 0) AS h
