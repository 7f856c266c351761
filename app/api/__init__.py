"""HTTP: routes, schemas, problems. No rules, no SQL."""
