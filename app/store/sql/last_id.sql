-- The greatest id in a place: what comes later has a greater one.
SELECT p.id FROM {schema}.{place} AS p ORDER BY p.id DESC LIMIT 1
