"""Functions of arrays that NumPy lacks, or that are faster than NumPy's."""

from __future__ import annotations

import numpy as np

__all__ = ["sorted_set"]


def sorted_set(values: np.ndarray) -> np.ndarray:
    """As ``np.unique`` of integers [n], whose hash table takes seconds for millions of units and classes."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered
