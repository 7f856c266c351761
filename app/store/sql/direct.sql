-- Tell a worker what to do. No row comes back for one that nobody knows.
UPDATE {schema}.workers SET directive = $2::text WHERE name = $1::text RETURNING name
