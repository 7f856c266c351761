-- Which of these jobs have not ended.
SELECT j.id FROM {schema}.jobs AS j WHERE j.id = ANY ($1::uuid[])
