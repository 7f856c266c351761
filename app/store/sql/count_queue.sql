-- How many jobs of one queue are kept, by state.
SELECT coalesce(sum(scheduled), 0)::bigint AS scheduled, coalesce(sum(ready), 0)::bigint AS ready,
       coalesce(sum(held), 0)::bigint AS held, coalesce(sum(active), 0)::bigint AS active,
       coalesce(sum(retry), 0)::bigint AS retry, coalesce(sum(completed), 0)::bigint AS completed,
       coalesce(sum(failed), 0)::bigint AS failed, coalesce(sum(cancelled), 0)::bigint AS cancelled,
       coalesce(sum(expired), 0)::bigint AS expired
  FROM (SELECT scheduled, ready, held, active, retry, completed, failed, cancelled, expired
          FROM {schema}.counts
         WHERE queue = $1::text
        UNION ALL
        SELECT scheduled, ready, held, active, retry, completed, failed, cancelled, expired
          FROM {schema}.deltas
         WHERE queue = $1::text) AS kept
