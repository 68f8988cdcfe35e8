"""The layers of the text model. Each knows its own arithmetic and takes states, positions and masks as arguments."""
