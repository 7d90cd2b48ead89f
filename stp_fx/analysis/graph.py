"""``ChannelGraph``: the solved analysis of one graph. Plain data, with the pictures and words it can give of itself."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from stp_fx.analysis.draw import draw, svg
from stp_fx.analysis.explain import explain
from stp_fx.analysis.groups import Axis, Group, Product
from stp_fx.analysis.pins import pinned_axes
from stp_fx.analysis.propagate import Contraction, Propagated
from stp_fx.analysis.solve import Solution
from stp_fx.analysis.touched import Touched
from stp_fx.rules import FIXED, Dim

__all__ = ["ChannelGraph", "alive_classes", "kept_positions", "removed_axes"]


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What lives and dies together in a graph.

    ``groups`` are scored and cut; ``units`` is how many units all groups have; ``products`` tie groups that are factors of one
    axis. ``unknown`` names the ATen ops that had no rule, with the nodes they occurred at: what they touch is pinned.
    """

    groups: tuple[Group, ...]
    units: int
    products: tuple[Product, ...]
    axes: tuple[Axis, ...]
    unknown: Mapping[str, list[str]]
    solution: Solution = dataclasses.field(repr=False)
    found: Propagated = dataclasses.field(repr=False)
    unit_class: np.ndarray = dataclasses.field(repr=False)
    touched: Touched = dataclasses.field(repr=False)

    @property
    def contractions(self) -> list[Contraction]:
        return self.found.contractions

    def value(self, node: str) -> Any:
        """The recorded factors of a graph node's value."""
        return self.found.values.get(node)

    @property
    def pinned(self) -> dict[str, tuple[str, ...]]:
        """Reason to the names of the axes (``"fc.weight:0"``) with a position that it pins; most axes first."""
        return pinned_axes(self)

    def explain(self, name: str | None = None, index: int | None = None) -> str:
        """Why an axis is pinned, or what goes with it, in words.

        ``name`` is a parameter or buffer (``"conv1.weight"``), one axis of it (``"conv1.weight:0"``), a module
        (``"conv1"``), a group, a node of the graph, or a reason that :attr:`pinned` gives; ``index`` a position along the
        axis. Without a name: how many groups there are, and why what is pinned is so.

        Raises:
            InputError: no such name, with close ones; or ``index`` out of range.
        """
        return explain(self, name, index)

    def draw(self, path: str | pathlib.Path, view: str = "dependency", fold: int | None = None) -> pathlib.Path:
        """A picture: ``.dot``, ``.png``, ``.svg`` or ``.pdf``; returns what was written.

        ``view``: ``"computational"`` (data flow), ``"dependency"`` (which calls lose channels together) or ``"combined"``; all
        three place every node alike. ``fold``: modules deeper than this are drawn as one node (0: nothing is folded; None:
        as deep as leaves at most 60 nodes). Pictures other than text need Graphviz's ``dot``; without it the ``.dot`` text is
        written in their place, and a warning says how to install it.

        Raises:
            InputError: an unknown view or suffix, or a negative ``fold``.
        """
        return draw(self, path, view, fold)

    def _repr_svg_(self) -> str | None:
        """What a notebook shows; None without Graphviz, so that it shows the text."""
        return svg(self)


def alive_classes(graph: ChannelGraph, removed: np.ndarray) -> np.ndarray:
    """Which classes survive when the flagged units go (bool, one per class)."""
    alive = np.ones(graph.solution.count, dtype=bool)
    alive[graph.unit_class[removed]] = False
    for product in graph.solution.products:
        lives = np.ones(product.classes.shape, dtype=bool)
        for k, factor in enumerate(product.factors):
            shape = [1] * lives.ndim
            shape[k] = -1
            lives &= alive[factor].reshape(shape)
        alive[product.classes[~lives]] = False
    return alive


def kept_positions(dim: Dim, alive: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which positions of a dimension survive (bool, one per position)."""
    keep = np.ones(1, dtype=bool)
    for factor in dim:
        part = np.ones(factor.size, dtype=bool) if factor.ids is None else (alive[label[factor.ids]] | (factor.ids == FIXED))
        keep = (keep[:, None] & part[None, :]).reshape(-1)
    return keep


def removed_axes(graph: ChannelGraph, alive: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """For every axis that gets shorter: the positions that stay (int64)."""
    result = {}
    for axis in graph.found.axes:
        keep = alive[graph.solution.label[axis.ids]]
        if not keep.all():
            result[(axis.tensor, axis.dim)] = np.flatnonzero(keep)
    return result
