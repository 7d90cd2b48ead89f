"""Constraints on how many units of a group may go."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["GroupLimits"]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupLimits:
    """``sizes`` [groups]: units of each group; ``largest`` [groups]: how many of them may go; kept counts are
    multiples of ``round_to``, or the whole group."""

    sizes: np.ndarray
    largest: np.ndarray
    round_to: int = 1

    @classmethod
    def of(cls, sizes: np.ndarray, *, max_ratio: float = 1.0, round_to: int = 1) -> GroupLimits:
        """Limits from ``max_ratio`` in (0, 1]: at most ``floor(max_ratio * n)`` units go, and one always stays."""
        capped = np.floor(max_ratio * sizes + 1e-9).astype(np.int64)
        return cls(sizes=sizes, largest=np.maximum(np.minimum(capped, sizes - 1), 0), round_to=int(round_to))

    def allowed(self, counts: np.ndarray) -> np.ndarray:
        """The number of units to remove [groups] nearest to ``counts`` that does not exceed it and is allowed.

        >>> GroupLimits.of(np.array([64, 64, 10, 3]), round_to=8).allowed(np.array([20, 0, 5, 2]))
        array([16,  0,  2,  0])
        """
        kept = self.sizes - np.minimum(counts, self.largest)
        rounded = -(-kept // self.round_to) * self.round_to
        return self.sizes - np.minimum(rounded, self.sizes)
