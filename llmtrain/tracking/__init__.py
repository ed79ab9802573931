"""What a run tells: metrics.jsonl, console, W&B, report."""
