-- Forget a queue's policy.
DELETE FROM {schema}.queues WHERE name = $1::text
