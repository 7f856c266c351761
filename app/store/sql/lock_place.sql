-- Lock those of these jobs ($2) that stand in a place and in a queue ($1). Who holds one at this moment is waited for; most
-- often the job has gone elsewhere then.
SELECT p.id FROM {schema}.{place} AS p WHERE p.id = ANY ($2::uuid[]) AND p.queue = $1::text ORDER BY p.id FOR UPDATE
