"""What a text is about and what may not stay in it: language, quality, private data, URLs, evals."""
