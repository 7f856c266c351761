"""The peers: each a small program that takes one JSON argument and answers with one JSON line."""
