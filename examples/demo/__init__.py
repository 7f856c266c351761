"""The demonstration: a service, workers in three languages, one of them killed, every result verified."""
