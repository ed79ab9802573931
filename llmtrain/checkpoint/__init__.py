"""Checkpoints without a layout: what is on the disk, how it gets there whole, how any rank reads its part."""
