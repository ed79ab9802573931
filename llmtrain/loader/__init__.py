"""Shards to batches on a rank; the position is one integer."""
