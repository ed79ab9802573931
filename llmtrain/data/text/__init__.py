"""Compiled loops over the bytes of many documents: cleaning, words, signals, edits."""
