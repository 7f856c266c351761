"""The rules of the queue: no I/O, no clock and no randomness of their own, standard library only."""
