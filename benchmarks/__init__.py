"""leaseq beside its peers: one machine, one PostgreSQL, in turn. `python -m benchmarks --help`."""
