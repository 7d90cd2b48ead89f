"""Multiply-accumulates, parameters and other work of a graph when only some classes are alive. Nothing is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from stp_fx.analysis.solved import Solved, kept_flags
from stp_fx.rules import FIXED, Dim, TensorDims
from stp_fx.text import html_table

__all__ = ["Cost", "macs_per_node", "parameter_count", "work_left"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """``macs``: multiply-accumulates of all contractions (conv, linear, matmul, attention) for the recorded example;
    ``params``: parameter elements, tied ones once; ``per_node``: MACs by graph node."""

    macs: int
    params: int
    per_node: Mapping[str, int] = dataclasses.field(repr=False)

    def _repr_html_(self) -> str:
        largest = sorted(self.per_node.items(), key=lambda item: -item[1])
        rows = [(node, f"{macs:,}", f"{macs / max(self.macs, 1):.1%}") for node, macs in largest]
        return html_table(f"{self.macs:,} MACs, {self.params:,} parameters", ("node", "MACs", "share"), rows)


def macs_per_node(solved: Solved, alive: np.ndarray) -> dict[str, int]:
    """MACs by graph node when only the flagged classes are alive (bool, one per class)."""
    living = _living(solved, alive)
    sizes: dict[int, int] = {}
    per_node: dict[str, int] = {}
    for entry in solved.found.contractions:
        if entry.multiplier:
            macs = entry.multiplier
            for dim in entry.letters:
                macs *= _alive_size(dim, living, sizes)
            per_node[entry.node] = per_node.get(entry.node, 0) + macs
    return per_node


def parameter_count(solved: Solved, alive: np.ndarray) -> int:
    """Elements of all parameters when only the flagged classes are alive (bool, one per class)."""
    living = _living(solved, alive)
    kept: dict[str, dict[int, int]] = {}
    for (tensor, dim), ids in () if living.all() else solved.elements_of.items():
        kept.setdefault(tensor, {})[dim] = int(living[ids].sum())
    total = 0
    for name in solved.parameters:
        sizes = list(solved.found.shapes[name])
        for dim, size in kept.get(solved.first_name(name), {}).items():
            sizes[dim] = size
        total += int(np.prod(sizes, dtype=np.int64))
    return total


def work_left(solved: Solved, alive: np.ndarray) -> dict[str, float]:
    """The fraction of each node's MACs that is left; of its output's elements, for a node without MACs."""
    whole, left = (macs_per_node(solved, each) for each in (np.ones_like(alive), alive))
    result = {name: left[name] / macs for name, macs in whole.items() if macs}
    known: dict[tuple[int, ...], float] = {}
    for name, value in solved.found.values.items():
        if name in result or not isinstance(value, TensorDims):
            continue
        fraction = 1.0
        for dim in value.dims:
            key = tuple(id(f.ids) if f.ids is not None else -f.size for f in dim)
            if key not in known:
                known[key] = float(kept_flags(solved, dim, alive).mean())
            fraction *= known[key]
        result[name] = fraction
    return result


def _living(solved: Solved, alive: np.ndarray) -> np.ndarray:
    """Bool, one per element."""
    living = alive[solved.label]
    living[FIXED] = True
    return living


def _alive_size(dim: Dim, living: np.ndarray, sizes: dict[int, int]) -> int:
    total = 1
    for factor in dim:
        if factor.ids is None:
            total *= factor.size
            continue
        key = id(factor.ids)
        if key not in sizes:
            sizes[key] = int(living[factor.ids].sum())
        total *= sizes[key]
    return total
