"""leaseq: a job queue that any language uses over HTTP."""
