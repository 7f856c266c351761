-- Lock those of these jobs ($1) that are ready still; what a claim or an edit holds at this moment is left to it.
SELECT r.id FROM {schema}.ready AS r WHERE r.id = ANY ($1::uuid[]) ORDER BY r.id FOR UPDATE SKIP LOCKED
