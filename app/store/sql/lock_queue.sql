-- Lock a queue that has a policy, so that what is read of it afterwards is what the next change finds.
SELECT q.name FROM {schema}.queues AS q WHERE q.name = $1::text FOR UPDATE
