"""Our checkpoints to and from those of PyTorch (DCP) and DeepSpeed (universal), one tensor at a time."""
