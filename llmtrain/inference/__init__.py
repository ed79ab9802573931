"""What a trained model is asked: held-out loss and sampled text."""
