"""From a compute budget to what to train, and how. numpy only."""
