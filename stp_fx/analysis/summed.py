"""Which positions a contraction sums over: where a mask must stand so that masking is removing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from stp_fx.analysis.solved import Solved
from stp_fx.rules import Dim, TensorDims

__all__ = ["removed_inputs", "summed_classes"]


def removed_inputs(solved: Solved, alive: np.ndarray, node: str, sources: Iterable[str]) -> list[tuple[str, int, np.ndarray]]:
    """See :meth:`Survivors.removed_inputs`; ``alive`` is bool, one per class."""
    if node not in solved.contracted:
        return []
    removed = summed_classes(solved, node) & ~alive
    result = []
    for source in sources:
        value = solved.found.values.get(source)
        for k, dim in enumerate(value.dims if isinstance(value, TensorDims) else ()):
            flags = _any_flagged(solved, dim, removed)
            if flags.any():
                result.append((source, k, flags))
    return result


def summed_classes(solved: Solved, node: str) -> np.ndarray:
    """The classes that the contractions of a node sum over, with their factors and what these are factors of (bool)."""
    summed = np.zeros(solved.solution.count, dtype=bool)
    summed[solved.label[solved.contracted[node]]] = True
    for product in reversed(solved.solution.products):
        for factor, where in zip(product.factors, np.nonzero(summed[product.classes]), strict=True):
            summed[factor[where]] = True
    for product in solved.solution.products:
        for k, factor in enumerate(product.factors):
            summed[np.moveaxis(product.classes, k, 0)[summed[factor]]] = True
    return summed


def _any_flagged(solved: Solved, dim: Dim, flagged: np.ndarray) -> np.ndarray:
    """Bool, one per position: whether a factor of it is flagged."""
    flags = np.zeros(1, dtype=bool)
    for factor in dim:
        part = np.zeros(factor.size, dtype=bool) if factor.ids is None else flagged[solved.label[factor.ids]]
        flags = (flags[:, None] | part[None, :]).reshape(-1)
    return flags
