"""The forms in which other tools publish quantized checkpoints: a file each, and table.py, which lists them."""
