"""Checkpoints in and out: files of tensors on one side, a Model on the other."""
