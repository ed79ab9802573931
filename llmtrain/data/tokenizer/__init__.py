"""Text to token ids and back. The only package that names SentencePiece."""
