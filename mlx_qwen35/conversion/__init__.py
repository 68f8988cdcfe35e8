"""From one checkpoint to another: what is written, in which form, and whether it is what it should be."""
