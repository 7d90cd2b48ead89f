"""Which units a class stands for: itself for a unit, its factors' units for a position of a product."""

from __future__ import annotations

import numpy as np

from stp_fx.analysis.solve import Solution, SolvedProduct
from stp_fx.arrays import sorted_set

__all__ = ["Touched"]


class Touched:
    """Class to units, as compressed rows: itself for a unit, the factors' units for a derived class."""

    def __init__(self, solution: Solution, unit_of: np.ndarray) -> None:
        self.number: int = int(unit_of.max(initial=0)) + 1
        classes = np.flatnonzero(unit_of >= 0)
        self.keys: np.ndarray = classes * self.number + unit_of[classes]
        self.units: np.ndarray
        self.start: np.ndarray
        self._index(solution.count)
        settled = ~solution.derived
        pending = list(solution.products)
        while pending:
            ready = [p for p in pending if all(settled[f].all() for f in p.factors)]
            pending = [p for p in pending if not all(settled[f].all() for f in p.factors)]
            if not ready:
                break
            self._add(solution.count, ready, settled)

    def _add(self, count: int, products: list[SolvedProduct], settled: np.ndarray) -> None:
        """Derived classes take the units of their factors; of several products of a class, all say the same."""
        new = [self.keys]
        for product in products:
            where = np.nonzero(~settled[product.classes])
            rows = product.classes[where]
            for factor, at in zip(product.factors, where, strict=True):
                position, unit = self.of(factor[at])
                new.append(rows[position] * self.number + unit)
        for product in products:
            settled[product.classes] = True
        self.keys = sorted_set(np.concatenate(new))
        self._index(count)

    def _index(self, count: int) -> None:
        classes, self.units = np.divmod(self.keys, self.number)
        self.start = np.searchsorted(classes, np.arange(count + 1))

    def of(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in ``labels``, unit) pairs, by position."""
        lengths = self.start[labels + 1] - self.start[labels]
        positions = np.repeat(np.arange(len(labels)), lengths)
        offsets = np.arange(len(positions)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return positions, self.units[np.repeat(self.start[labels], lengths) + offsets]
