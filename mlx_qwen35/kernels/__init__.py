"""One folder per operation: reference.py in plain MLX, and a dispatch that takes the fastest form at hand."""
