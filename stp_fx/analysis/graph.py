"""``ChannelGraph``: what can be removed from one graph, and what a plan leaves of it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from stp_fx.analysis.chosen import too_few
from stp_fx.analysis.drawing import drawing
from stp_fx.analysis.explain import explain
from stp_fx.analysis.groups import Axis, Group, Product
from stp_fx.analysis.liveness import Cut, alive_under
from stp_fx.analysis.pins import pin_reasons, pinned_axes
from stp_fx.analysis.plan import PrunePlan
from stp_fx.analysis.plans import plan_for, plan_removing
from stp_fx.analysis.propagated import Contraction
from stp_fx.analysis.solved import Solved, removable, units_along
from stp_fx.analysis.survivors import Survivors
from stp_fx.checks import is_a
from stp_fx.errors import InputError, PlanError
from stp_fx.rules import Dim
from stp_fx.text import html_table
from stp_fx.views import Drawing, draw, svg

__all__ = ["ChannelGraph"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ChannelGraph:
    """The channels of a graph that are removed together. Plain data and questions about it, without tensors or the graph.

    :func:`stp_fx.analyze` makes it. ``groups`` are scored and cut, ``survivors`` says what a plan leaves, ``plan_for`` makes
    a plan by hand, ``explain`` gives reasons in words.
    """

    _solved: Solved

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[Group, ...]:
        """Units that touch the same axes in the same way."""
        return self._solved.groups

    @property
    def units(self) -> int:
        """How many units all groups have together."""
        return self._solved.units

    @property
    def products(self) -> tuple[Product, ...]:
        """Which groups are factors of one axis, as heads and the positions inside every head."""
        return self._solved.products

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every dimension longer than one of every parameter and buffer, tied tensors once."""
        return self._solved.axes

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every parameter and buffer, under each of its names, to its shape."""
        return self._solved.found.shapes

    @property
    def contractions(self) -> Sequence[Contraction]:
        """The sums of products (conv, linear, matmul, attention) of every node, with the dimensions that they go over."""
        return self._solved.found.contractions

    @property
    def unknown(self) -> Mapping[str, list[str]]:
        """ATen ops that have no rule, with the nodes they occur at: all that they touch is pinned."""
        return self._solved.found.unknown

    @cached_property
    def pinned(self) -> dict[str, tuple[str, ...]]:
        """Reason to the names of the axes (``"fc.weight:0"``) with a position that it pins; most axes first."""
        return pinned_axes(self._solved)

    @property
    def index_buffers(self) -> frozenset[str]:
        """Buffers whose values are positions along an axis: removal renumbers them."""
        return frozenset(self._solved.found.renumbered)

    def first_name(self, tensor: str) -> str:
        """The name under which a tied parameter or buffer stands in ``axes``; any other name as it is."""
        return self._solved.first_name(tensor)

    def value(self, node: str) -> Any:
        """The value of a graph node: the dimensions of a tensor (``TensorDims``), lists and dicts of them, or a number."""
        return self._solved.found.values.get(node)

    def units_along(self, dim: Dim) -> tuple[np.ndarray, np.ndarray]:
        """(position, unit) pairs along a dimension of a value, int64, sorted by position.

        A pinned position has no pair; one of a product has a pair for each factor.
        """
        return units_along(self._solved, dim)

    def pieces(self) -> list[np.ndarray]:
        """Arrays of units (int64) of which one must be kept each: all positions of a tensor or of a part of one."""
        return list(self._solved.pieces)

    # -- what a plan leaves ----------------------------------------------------------------------------------------

    def survivors(self, plan: Cut | None = None, *, partial: bool = False) -> Survivors:
        """The channels that ``plan`` keeps; of None, all of them.

        ``partial`` accepts a plan without an entry for every axis that it shortens, which a masked graph needs: its mask buffers
        are in no plan.

        Raises:
            PlanError: the plan does not fit the graph; names the axis.
        """
        if plan is None:
            return Survivors.everything(self._solved)
        if not all(is_a(getattr(plan, each, None), Mapping) for each in ("kept", "sizes")):
            raise InputError(f"`plan` is a {type(plan).__name__}; give a PrunePlan (stp_fx.plan_of, ChannelGraph.plan_for)")
        units, alive = alive_under(self._solved, plan, partial=partial)
        for group, kept in too_few(self.groups, units):
            raise PlanError(
                f"the plan keeps {kept} experts of group '{group.name}', of which {group.chosen} are chosen for every token; "
                f"keep at least {group.chosen}"
            )
        return Survivors(units, self._solved, alive)

    def survivors_without(self, removed: np.ndarray) -> Survivors:
        """The channels that are kept when the flagged units are removed (bool, one per unit). A search over plans calls this."""
        return Survivors.without(self._solved, removed)

    def plan_removing(self, removed: np.ndarray) -> PrunePlan:
        """The plan that removes the flagged units (bool, one per unit) from every axis they touch.

        It has no entries for mask buffers, so it also fits the graph without masks.

        Raises:
            InputError: not one flag a unit.
            PlanError: an axis would lose all its positions.
        """
        return plan_removing(self._solved, removed)

    def plan_for(self, removed: Mapping[str, Sequence[int] | np.ndarray]) -> PrunePlan:
        """The plan that removes channels chosen by hand, and all that goes with them.

        Keys are names of modules or parameters, which stand for their output axis, or of axes (``"conv1.weight:1"``). Values are
        indices along that axis; negative ones count from the end, repeated ones count once. Every unit at such an index is
        removed from all axes it touches, so a unit named in part (one position of a flattened map) is removed whole. An axis
        that is a product (heads x head_dim) loses whole units of a factor: give all positions of a head.

        Raises:
            InputError: an unknown name, an index out of range, a pinned position (with the reason), a position of a product
                without the others of its unit (names them), or nothing would be left of a tensor.

        Example:
            >>> from torch import nn, randn
            >>> import stp_fx
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
            >>> gm = stp_fx.trace(net, randn(1, 3, 8, 8))
            >>> plan = stp_fx.analyze(gm).plan_for({"0": [1, -1]})
            >>> plan.kept["2.weight", 1]
            array([0, 2, 3, 4, 5, 6])
            >>> stp_fx.apply_plan(gm, plan).get_parameter("0.weight").shape
            torch.Size([6, 3, 3, 3])
        """
        return plan_for(self._solved, removed)

    # -- in words and pictures -------------------------------------------------------------------------------------

    def explain(self, name: str | None = None, index: int | None = None) -> str:
        """Why an axis is pinned, or what is removed with it, in words.

        ``name`` is a parameter or buffer (``"conv1.weight"``), one axis of it (``"conv1.weight:0"``), a module
        (``"conv1"``), a group, a node of the graph, or a reason that :attr:`pinned` gives; ``index`` a position along the
        axis. Without a name: how many groups there are, and why what is pinned is so.

        Raises:
            InputError: no such name, with close ones; or ``index`` out of range.
        """
        return explain(self._solved, name, index)

    def pin_reasons(self, axis: str) -> list[str]:
        """Why positions of an axis (``"fc.weight:0"``) are pinned, each reason with its nodes; empty if none is.

        Raises:
            InputError: no such axis.
        """
        tensor, _, dim = axis.rpartition(":")
        ids = self._solved.elements_of.get((self.first_name(tensor), int(dim) if dim.isdigit() else -1))
        if ids is None:
            raise InputError(f"the graph has no axis {axis!r}; an axis is named like 'conv1.weight:0'")
        if not len(ids):
            return ["an axis of length 0"]
        classes = self._solved.label[ids]
        held = classes[~removable(self._solved, classes)]
        return pin_reasons(self._solved, held) if len(held) else []

    def draw(
        self,
        path: str | pathlib.Path,
        view: str = "dependency",
        fold: int | None = None,
        plan: PrunePlan | None = None,
    ) -> pathlib.Path:
        """A picture: ``.dot``, ``.png``, ``.svg`` or ``.pdf``; returns what was written.

        ``view``: ``"computational"`` (data flow), ``"dependency"`` (which calls lose channels together) or ``"combined"``; all
        three place every node alike. ``fold``: modules deeper than this are drawn as one node (0: nothing is folded; None:
        as deep as leaves at most 60 nodes). Pictures other than text need Graphviz's ``dot``; without it the ``.dot`` text is
        written in their place, and a warning says how to install it. With a ``plan`` for this graph, captions give the share of
        the units that it removes.

        Raises:
            InputError: an unknown view or suffix, or a negative ``fold``.
            PlanError: the plan does not fit this graph.
        """
        shown = drawing(self._solved, None if plan is None else self.survivors(plan).units)
        return draw(shown, path, view, fold)

    def drawing(self) -> Drawing:
        """The calls of the graph and its groups as plain data, of which pictures are made."""
        return drawing(self._solved)

    def summary(self) -> str:
        """One line a group, ``name size axes``, under a line of totals."""
        lines = [f"  {group.name} {group.size} units, {len(group.members)} axes" for group in self.groups]
        return "\n".join([repr(self), *lines])

    def __repr__(self) -> str:
        inexact = sum(not group.exact for group in self.groups)
        also = "".join(
            (
                f"; masking is not removing in {inexact} groups" if inexact else "",
                f"; {len(self.unknown)} ops without a rule" if self.unknown else "",
            )
        )
        return (
            f"ChannelGraph({len(self.groups)} groups, {self.units} units over {len(self.axes)} axes; "
            f"{len(self.pinned)} reasons for pinned axes{also})"
        )

    def _repr_html_(self) -> str:
        rows = [(g.name, g.size, len(g.members), "yes" if g.exact else "no") for g in self.groups]
        table = html_table(repr(self), ("group", "units", "axes", "masking = removing"), rows)
        picture = self._repr_svg_()
        return table if picture is None else f"{table}\n<div>{picture[picture.index('<svg') :]}</div>"

    def _repr_svg_(self) -> str | None:
        """The dependency view; None without Graphviz."""
        return svg(self.drawing())
