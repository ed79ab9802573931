"""One Hydra entry point per verb."""
