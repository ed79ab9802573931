"""Raw text to shards of tokens, on CPU nodes and without torch."""
