-- What the function enqueue() can not see: the environment's defaults for jobs, and its limits. Written when it is
-- another than it was.
INSERT INTO {schema}.defaults AS d (name, value)
VALUES ('environment', $1::jsonb)
ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE d.value <> excluded.value
