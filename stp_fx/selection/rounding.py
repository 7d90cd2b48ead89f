"""Constraints on how many units of a group may be removed."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["GroupLimits"]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupLimits:
    """How many units every group may lose, as int64 arrays of shape [groups].

    ``sizes``: units of each group. ``capped``: the largest number that ``max_ratio`` allows to remove. ``held``: units that are
    kept because a piece of a tensor would lose all its positions. Kept counts are multiples of ``round_to``, or the whole
    group, and one unit is always kept. ``chosen``: how many units of each group are chosen for a token; so many are kept.
    """

    sizes: np.ndarray
    capped: np.ndarray
    held: np.ndarray
    max_ratio: float = 1.0
    round_to: int = 1
    chosen: np.ndarray | int = 0

    @classmethod
    def of(cls, sizes: np.ndarray, *, max_ratio: float = 1.0, round_to: int = 1, chosen: np.ndarray | int = 0) -> GroupLimits:
        """Limits from ``max_ratio`` in (0, 1]: at most ``floor(max_ratio * n)`` units are removed; nothing is held."""
        capped = np.floor(max_ratio * sizes + 1e-9).astype(np.int64)
        return cls(sizes, capped, np.zeros_like(sizes), float(max_ratio), int(round_to), chosen)

    def holding(self, held: np.ndarray) -> GroupLimits:
        """The same limits with ``held`` units of each group kept (int64 [groups])."""
        return dataclasses.replace(self, held=held)

    @property
    def largest(self) -> np.ndarray:
        """The largest number of units to remove, before rounding: int64 [groups]."""
        free = np.minimum(self.sizes - np.maximum(self.chosen, 1), self.sizes - self.held)
        return np.maximum(np.minimum(self.capped, free), 0)

    def allowed(self, counts: np.ndarray) -> np.ndarray:
        """The number of units to remove [groups] nearest to ``counts`` that does not exceed it and is allowed.

        It rises with ``counts``: a larger count is never rounded to a smaller one.

        >>> GroupLimits.of(np.array([64, 64, 10, 3]), round_to=8).allowed(np.array([20, 0, 5, 2]))
        array([16,  0,  2,  0])
        """
        return self._rounded(np.minimum(counts, self.largest))

    def reasons(self, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """Which constraint keeps which group from losing ``wanted`` units: bool [groups] by name.

        Names: "one unit" (a group keeps at least one), "top-k" (as many as are chosen), "max_ratio", "pieces", "round_to".

        >>> found = GroupLimits.of(np.array([64, 10]), max_ratio=0.5, round_to=8).reasons(np.array([40, 5]))
        >>> {name: groups.tolist() for name, groups in found.items() if groups.any()}
        {'max_ratio': [True, False], 'round_to': [False, True]}
        """
        with_one = np.minimum(wanted, np.maximum(self.sizes - 1, 0))
        enough = np.minimum(with_one, np.maximum(self.sizes - self.chosen, 0))
        capped = np.minimum(enough, self.capped)
        free = np.minimum(capped, self.sizes - self.held)
        return {
            "one unit": wanted > with_one,
            "top-k": with_one > enough,
            "max_ratio": enough > capped,
            "pieces": capped > free,
            "round_to": free > self._rounded(free),
        }

    def label(self, name: str) -> str:
        """The name of a constraint, with its value if it has one: ``"round_to=8"``."""
        return f"{name}={getattr(self, name):g}" if name in ("max_ratio", "round_to") else name

    def _rounded(self, counts: np.ndarray) -> np.ndarray:
        step = min(self.round_to, int(self.sizes.max(initial=0)) + 1)  # a larger one keeps whole groups as well
        kept = -(-(self.sizes - counts) // step) * step
        return self.sizes - np.minimum(kept, self.sizes)
