-- Which of these jobs have not ended: the living have a body, and only they have one.
SELECT id FROM {schema}.jobs WHERE id = ANY ($1::uuid[])
