"""What lies in a checkpoint: its tensors under published names and ours, and how they become a Model."""
