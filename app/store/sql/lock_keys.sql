-- Lock up to $3 unique keys behind the key $2 of the queue $1, in their order; what others hold is passed over.
SELECT u.queue, u.key
  FROM {schema}.unique_keys AS u
 WHERE (u.queue, u.key) > ($1::text, $2::text)
 ORDER BY u.queue, u.key
 LIMIT $3::int
   FOR UPDATE SKIP LOCKED
