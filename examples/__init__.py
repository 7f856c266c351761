"""Workers in three languages, a producer, and a demonstration that runs them together."""
