"""Rules: pure functions from signals to which documents they drop."""
