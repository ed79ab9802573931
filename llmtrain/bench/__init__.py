"""`llmtrain bench TOPIC`: our figures beside the rivals' or the limit, from the same run."""
