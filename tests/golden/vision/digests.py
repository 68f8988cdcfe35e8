"""Short stand-ins for arrays too large to store. Knows NumPy only."""

import hashlib

import numpy as np


def levels_digest(pixels: np.ndarray) -> str:
    """Of pixel values from -1 to 1: a hash of the levels 0..255 that they stand for, row by row."""
    levels = np.rint((pixels.astype(np.float64) + 1) * 127.5).astype(np.uint8)
    return hashlib.sha256(np.ascontiguousarray(levels)).hexdigest()[:16]


def positions_digest(positions: np.ndarray) -> str:
    """Of position ids [3, T]."""
    return hashlib.sha256(np.ascontiguousarray(positions, dtype=np.int32)).hexdigest()[:16]
