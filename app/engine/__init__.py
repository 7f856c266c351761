"""The machine of one process: use cases, wake-ups of waiting leases, maintenance, start and stop."""
