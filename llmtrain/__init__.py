"""llmtrain: from a compute budget and raw text to a trained, evaluated, exported language model."""
