-- Remove unique keys that this transaction has locked ($1 queues, $2 keys).
DELETE FROM {schema}.unique_keys
 WHERE ctid = ANY (ARRAY(
         SELECT mine.tid
           FROM unnest($1::text[], $2::text[]) AS t(queue, key)
          CROSS JOIN LATERAL (
                 SELECT u.ctid AS tid FROM {schema}.unique_keys AS u WHERE u.queue = t.queue AND u.key = t.key
                 OFFSET 0) AS mine))
