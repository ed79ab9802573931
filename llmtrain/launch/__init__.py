"""Command lines that start processes. No torch."""
