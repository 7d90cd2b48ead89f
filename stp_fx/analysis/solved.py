"""``Solved``: what the analysis works with. Elements, classes and units; only this folder knows of them.

An *element* is a position as the run over the graph met it, a *class* the elements that solving made one, a *unit* a class that
can be removed. Arrays of flags are bool, one per class or one per unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from stp_fx.analysis.chosen import least_of
from stp_fx.analysis.groups import Axis, Group, Product
from stp_fx.analysis.propagated import Propagated
from stp_fx.analysis.solve import Solution
from stp_fx.analysis.touched import Touched
from stp_fx.rules import FIXED, Dim, dim_size

__all__ = ["Solved", "alive_classes", "kept_axes", "kept_flags", "removable", "units_along"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Solved:
    """One solved run over a graph, and the groups made of it.

    ``found`` is what the run recorded, ``solution`` what follows from it, ``unit_class[unit]`` the class of a unit,
    ``touched`` the units of any class. ``parameters`` names the graph's parameters, tied ones once.
    """

    groups: tuple[Group, ...]
    products: tuple[Product, ...]
    axes: tuple[Axis, ...]
    parameters: tuple[str, ...]
    found: Propagated
    solution: Solution
    unit_class: np.ndarray
    touched: Touched

    @property
    def units(self) -> int:
        """How many units the graph has."""
        return len(self.unit_class)

    @property
    def label(self) -> np.ndarray:
        """Element to class."""
        return self.solution.label

    @cached_property
    def unit_of(self) -> np.ndarray:
        """Class to unit; -1 for a class that is none."""
        result = np.full(self.solution.count, -1, dtype=np.int64)
        result[self.unit_class] = np.arange(self.units)
        return result

    @cached_property
    def classes_of(self) -> Mapping[tuple[str, int], np.ndarray]:
        """The classes of the positions of an axis, by tensor (its first name) and dimension."""
        return {key: self.label[ids] for key, ids in self.elements_of.items()}

    @cached_property
    def elements_of(self) -> Mapping[tuple[str, int], np.ndarray]:
        """The elements of an axis, by tensor (its first name) and dimension."""
        return {(axis.tensor, axis.dim): axis.ids for axis in self.found.axes}

    @cached_property
    def chosen(self) -> np.ndarray:
        """Whether something chooses among the positions of a class by number: bool, one per class."""
        return least_of(self.found.elements, self.solution) > 0

    def first_name(self, tensor: str) -> str:
        """The name under which a tied tensor stands in ``axes``."""
        return self.found.aliases.get(tensor, tensor)

    @cached_property
    def contracted(self) -> Mapping[str, np.ndarray]:
        """The elements that a node's contractions sum over, by node; nodes that sum over none are left out."""
        found: dict[str, list[np.ndarray]] = {}
        for entry in self.found.contractions:
            ids = [factor.ids for dim in entry.contracted for factor in dim if factor.ids is not None]
            if ids:
                found.setdefault(entry.node, []).extend(ids)
        return {node: np.concatenate([each.ravel() for each in ids]) for node, ids in found.items()}

    @cached_property
    def pieces(self) -> tuple[np.ndarray, ...]:
        """See :meth:`ChannelGraph.pieces`."""
        return tuple(self._pieces())

    def _pieces(self) -> Iterator[np.ndarray]:
        seen: set[int] = set()
        known: set[bytes] = set()
        for ids in self.found.pieces():
            if id(ids) in seen:
                continue
            seen.add(id(ids))
            labels = self.label[ids]
            units = self.unit_of[labels]
            for part in self._grid(labels) if len(units) and units.min() < 0 else (units,):
                if len(part) and (content := part.tobytes()) not in known:
                    known.add(content)
                    yield part

    def _grid(self, labels: np.ndarray) -> Sequence[np.ndarray]:
        """Sets of units: if one of each set stays, so does one of these positions, some of which are of products.

        A position of a product stays if all its factors do. Of two, the sets are the sides of a grid that lies whole among
        the positions. No set, where a position stays anyway.
        """
        positions, units = self.touched.of(labels)
        counts = np.bincount(positions, minlength=len(labels))
        if not counts.all():
            return ()
        alone = units[counts[positions] == 1]
        if len(alone):
            return (alone,)
        if (counts != 2).any():
            return tuple(units[positions == 0][:, None])
        first, second = np.sort(units.reshape(-1, 2), axis=1).T
        values, frequency = np.unique(first, return_counts=True)
        across = np.unique(second[first == values[frequency.argmax()]])
        inside = np.isin(second, across)
        values, frequency = np.unique(np.unique(np.stack([first, second], axis=1)[inside], axis=0)[:, 0], return_counts=True)
        return values[frequency == len(across)], across


def alive_classes(solved: Solved, removed: np.ndarray) -> np.ndarray:
    """Which classes survive when the flagged units are removed (bool, one per class)."""
    alive = np.ones(solved.solution.count, dtype=bool)
    alive[solved.unit_class[removed]] = False
    for product in solved.solution.products:
        lives = np.ones(product.classes.shape, dtype=bool)
        for k, factor in enumerate(product.factors):
            shape = [1] * lives.ndim
            shape[k] = -1
            lives &= alive[factor].reshape(shape)
        alive[product.classes[~lives]] = False
    return alive


def kept_flags(solved: Solved, dim: Dim, alive: np.ndarray) -> np.ndarray:
    """Which positions of a dimension survive (bool, one per position)."""
    keep = np.ones(1, dtype=bool)
    for factor in dim:
        ids = factor.ids
        part = np.ones(factor.size, dtype=bool) if ids is None else alive[solved.label[ids]] | (ids == FIXED)
        keep = (keep[:, None] & part[None, :]).reshape(-1)
    return keep


def kept_axes(solved: Solved, alive: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """For every axis that gets shorter: the positions that are kept (int64)."""
    result = {}
    for key, classes in solved.classes_of.items():
        keep = alive[classes]
        if not keep.all():
            result[key] = np.flatnonzero(keep)
    return result


def removable(solved: Solved, classes: np.ndarray) -> np.ndarray:
    """Which of the given classes can be removed: not pinned, and a unit or made of units (bool, one per given class)."""
    result = np.zeros(len(classes), dtype=bool)
    result[solved.touched.of(classes)[0]] = True
    return result & ~solved.solution.pinned[classes]


def units_along(solved: Solved, dim: Dim) -> tuple[np.ndarray, np.ndarray]:
    """(position along ``dim``, unit) pairs, sorted by position; a position of a product has one pair for each factor."""
    positions, units = [], []
    inner = dim_size(dim)
    for factor in dim:
        inner //= factor.size
        if factor.ids is None:
            continue
        at, unit = solved.touched.of(solved.label[factor.ids])
        outer = dim_size(dim) // (factor.size * inner)
        block = (np.arange(outer)[:, None] * factor.size + at[None, :]).ravel()
        positions.append((block[:, None] * inner + np.arange(inner)[None, :]).ravel())
        units.append(np.repeat(np.tile(unit, outer), inner))
    if not positions:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    position, unit = np.concatenate(positions), np.concatenate(units)
    order = np.lexsort((unit, position))
    return position[order], unit[order]
