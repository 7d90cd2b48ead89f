"""The cost of one unit: how much of a graph's work is saved when it is removed, for all units at once.

A piece of work is proportional to the sizes of some factors: the MACs of a contraction to those of its letters, the
elements of a parameter to those of its axes. Without a unit that holds d_k of the s_k positions of factor k, the part
``prod(1 - d_k / s_k)`` of it is left. That is exact, and one walk over the work serves all units; a cost analysis for
each unit would be quadratic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.rules import Dim, TensorDims, dim_size

__all__ = ["Work", "activation_elements", "contraction_macs", "group_costs", "parameter_elements", "unit_savings"]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """``amount`` of something (MACs, elements, seconds), proportional to the lengths of ``factors`` (element ids each).

    ``where`` is the graph node or parameter it belongs to.
    """

    where: str
    amount: float
    factors: tuple[np.ndarray, ...]


def contraction_macs(graph: ChannelGraph) -> Iterator[Work]:
    """The multiply-accumulates of every contraction."""
    for entry in graph.contractions:
        if entry.multiplier:
            amount = entry.multiplier * math.prod(dim_size(dim) for dim in entry.letters)
            yield Work(entry.node, float(amount), _ids(entry.letters))


def parameter_elements(graph: ChannelGraph, parameters: Iterable[str]) -> Iterator[Work]:
    """The elements of every named parameter, tied ones once."""
    axes: dict[str, list[np.ndarray]] = {}
    for (tensor, _), ids in graph._solved.elements_of.items():
        axes.setdefault(tensor, []).append(ids)
    for name in dict.fromkeys(map(graph.first_name, parameters)):
        yield Work(name, float(math.prod(graph.shapes[name])), tuple(axes.get(name, ())))


def activation_elements(graph: ChannelGraph, nodes: Iterable[str]) -> Iterator[Work]:
    """The elements of the tensors that the named nodes give."""
    for node in nodes:
        for value in _tensors(graph.value(node)):
            yield Work(node, float(math.prod(map(dim_size, value.dims))), _ids(value.dims))


def unit_savings(graph: ChannelGraph, work: Iterable[Work]) -> np.ndarray:
    """The cost saved when a unit alone is removed: float64, one per unit of the graph."""
    counted = _Counted(graph)
    saved, left = np.zeros(graph.units), np.ones(graph.units)
    for piece in work:
        parts = [counted.fractions(ids) for ids in piece.factors]
        for units, fraction in parts:
            left[units] *= 1.0 - fraction
        for units in _touched(parts):
            saved[units] += piece.amount * (1.0 - left[units])
            left[units] = 1.0
    return saved


def group_costs(graph: ChannelGraph, work: Iterable[Work], per: str) -> np.ndarray:
    """By group index, float64: ``per`` "unit": what one unit of the group saves (the mean over its units);
    "layer": all work that any unit of the group is part of."""
    if per == "unit":
        saved = unit_savings(graph, work)
        return np.array([saved[group.units].mean() for group in graph.groups])
    counted, owner = _Counted(graph), _owners(graph.groups, graph.units)
    total = np.zeros(len(graph.groups))
    for piece in work:
        units = [counted.fractions(ids)[0] for ids in piece.factors]
        if units:
            total[np.unique(owner[np.concatenate(units)])] += piece.amount
    return total


class _Counted:
    """Element arrays to the units in them, with the fraction of the positions that each holds; kept, as arrays recur."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._solved = graph._solved
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def fractions(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if id(ids) not in self._known:
            _, unit = self._solved.touched.of(self._solved.label[ids])
            units, counts = np.unique(unit, return_counts=True)
            self._known[id(ids)] = (units, counts / len(ids))
        return self._known[id(ids)]


def _touched(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The units of all factors, each once."""
    if len(parts) < 2:
        return [units for units, _ in parts]
    return [np.unique(np.concatenate([units for units, _ in parts]))]


def _owners(groups: Sequence[Group], units: int) -> np.ndarray:
    owner = np.empty(units, dtype=np.int64)
    for group in groups:
        owner[group.units] = group.index
    return owner


def _ids(dims: Iterable[Dim]) -> tuple[np.ndarray, ...]:
    return tuple(factor.ids for dim in dims for factor in dim if factor.ids is not None)


def _tensors(value: Any) -> Iterator[TensorDims]:
    if isinstance(value, TensorDims):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
