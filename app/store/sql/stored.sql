-- Which of these jobs are stored, wherever they are by now: asked when the connection died at the COMMIT of an
-- enqueue.
SELECT id, created_at, run_at, expires_at FROM {schema}.jobs WHERE id = ANY ($1::uuid[])
UNION ALL
SELECT id, created_at, run_at, expires_at FROM {schema}.dead WHERE id = ANY ($1::uuid[])
UNION ALL
SELECT id, created_at, run_at, expires_at FROM {schema}.history WHERE id = ANY ($1::uuid[])
