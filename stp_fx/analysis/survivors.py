"""``Survivors``: what a plan leaves of a graph, worked out without carrying the plan out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np

from stp_fx.analysis.counts import Cost, macs_per_node, parameter_count, work_left
from stp_fx.analysis.solved import Solved, alive_classes, kept_axes, kept_flags
from stp_fx.analysis.summed import removed_inputs
from stp_fx.errors import InputError
from stp_fx.rules import Dim
from stp_fx.text import html_table

__all__ = ["Survivors"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Survivors:
    """The kept channels of a graph once some of its units are removed (or masked). :meth:`ChannelGraph.survivors` gives it.

    ``units`` flags the units that are kept (bool, one per unit of the graph). All else follows from it and is computed when asked
    for.
    """

    units: np.ndarray
    _solved: Solved
    _alive: np.ndarray

    @classmethod
    def everything(cls, solved: Solved) -> Survivors:
        """Nothing is removed."""
        return cls(np.ones(solved.units, dtype=bool), solved, np.ones(solved.solution.count, dtype=bool))

    @classmethod
    def without(cls, solved: Solved, removed: np.ndarray) -> Survivors:
        """The flagged units (bool, one per unit) are removed."""
        return cls(~removed, solved, alive_classes(solved, removed))

    @cached_property
    def axes(self) -> Mapping[tuple[str, int], np.ndarray]:
        """Every axis that gets shorter, by tensor and dimension: the positions that are kept (int64, ascending).

        A tied tensor stands under its first name (:meth:`ChannelGraph.first_name`).
        """
        return kept_axes(self._solved, self._alive)

    def kept(self, tensor: str, dim: int) -> np.ndarray:
        """The positions of one axis that are kept (int64, ascending); all of them if the axis stays whole.

        Raises:
            InputError: no such tensor or dimension.
        """
        shape = self._solved.found.shapes.get(tensor, ())
        if not 0 <= dim < len(shape):
            raise InputError(f"the graph has no axis '{tensor}:{dim}'" + (f"; the tensor has shape {shape}" if shape else ""))
        known = self.axes.get((self._solved.first_name(tensor), dim))
        return np.arange(shape[dim]) if known is None else known

    def flags(self, dim: Dim) -> np.ndarray:
        """Which positions along a dimension of a node's value (:meth:`ChannelGraph.value`) are kept (bool)."""
        return kept_flags(self._solved, dim, self._alive)

    def indexed(self, buffer: str) -> np.ndarray | None:
        """For a buffer whose values are positions along an axis: which positions of that axis are kept (bool); else None."""
        ids = self._solved.found.renumbered.get(buffer)
        return None if ids is None else self._alive[self._solved.label[ids]]

    def removed_inputs(self, node: str, sources: Iterable[str]) -> list[tuple[str, int, np.ndarray]]:
        """Where ``node`` sums over removed positions of the values of ``sources``: (source, dimension, removed flags (bool))."""
        return removed_inputs(self._solved, self._alive, node, sources)

    def excluded(self, node: str) -> list[tuple[int, np.ndarray, float]]:
        """Where ``node`` chooses or weighs removed experts: dimension of its first operand, removed flags (bool), and the value
        of which it takes no notice."""
        chosen = self._solved.chosen
        found: list[tuple[int, np.ndarray, float]] = []
        for each in self._solved.found.elements.exclusions if chosen.any() else ():
            classes = self._solved.label[each.ids]
            removed = ~self._alive[classes] & chosen[classes]
            if each.node == node and removed.any():
                found.append((each.dim, removed, each.value))
        return found

    @property
    def cost(self) -> Cost:
        """MACs and parameters that are left."""
        return Cost(self.macs, self.params, self._per_node)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates that are left."""
        return sum(self._per_node.values())

    @cached_property
    def params(self) -> int:
        """Parameter elements that are left, tied ones once."""
        return parameter_count(self._solved, self._alive)

    def work_left(self) -> dict[str, float]:
        """The fraction of each node's MACs that is left; of its output's elements, for a node without MACs."""
        return work_left(self._solved, self._alive)

    @cached_property
    def _per_node(self) -> dict[str, int]:
        return macs_per_node(self._solved, self._alive)

    def __repr__(self) -> str:
        return f"Survivors({int(self.units.sum())} of {len(self.units)} units kept, {len(self.axes)} axes shortened)"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, ...]] = []
        for group in self._solved.groups:
            kept = int(self.units[group.units].sum())
            if kept < group.size:
                rows.append((group.name, f"{kept}/{group.size}", f"{kept / group.size:.0%}"))
        return html_table(repr(self), ("group", "kept", "left"), rows)
