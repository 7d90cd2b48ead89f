"""Positions that data choose: experts that a router picks, and the values of a graph that are numbers of such positions.

``topk`` over an axis gives numbers of its positions. If the axis gets shorter, ``topk`` numbers the positions that are left, so
every consumer of the numbers has to be along the same axis. A value is followed through ops that only move it; any other
op on it pins the axis. Masked positions read ``-inf`` where they are chosen among and where a softmax weighs them: a zero could
be chosen, and would have a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from stp_fx.analysis.elements import Elements
from stp_fx.analysis.groups import Group
from stp_fx.analysis.propagated import AxisRecord
from stp_fx.analysis.solve import Solution
from stp_fx.rules import Dim, Factor, OpCall

__all__ = ["Numbers", "is_reached", "least_of", "pin_unfit_choices", "too_few"]

aten = torch.ops.aten

_MOVES = frozenset((
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.transpose.int, aten.permute.default, aten.t.default, aten.expand.default,
    aten.clone.default, aten.detach.default, aten.alias.default, aten.slice.Tensor, aten.select.int, aten.sort.default,
    aten.sort.stable, aten._to_copy.default,
))  # fmt: skip
"""Ops whose first result holds values of their first operand, in any order."""
_NO_VALUES = frozenset((
    aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_empty.default, aten.full_like.default, aten.new_full.default,
))  # fmt: skip
_EXACT = (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
"""Types that hold the number of any expert exactly."""


class Numbers:
    """The meaning of tensors of whole numbers: each is about the positions of a dimension.

    Kinds: ``"position"`` (each value is the number of a position), ``"count"`` (how often each position was chosen) and ``"end"``
    (the running sum of counts).
    """

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        self._known: dict[int, tuple[torch.Tensor, Dim, str]] = {}  # with the tensor, so that its id stays its own
        self._asked: set[int] = set()
        self._unused: dict[int, tuple[Dim, str]] = {}  # by the id of the dimension, with the node that numbers it
        self._used: dict[int, Dim] = {}

    def state(self, tensor: torch.Tensor, dim: Dim, kind: str) -> None:
        self._known[id(tensor)] = (tensor, dim, kind)
        if id(dim) not in self._used:
            self._unused.setdefault(id(dim), (dim, self._elements.node))

    def ask(self, tensor: Any, kind: str) -> Dim | None:
        """The dimension, for a rule that keeps the numbers right."""
        known = self._known.get(id(tensor))
        if known is None or known[2] != kind:
            return None
        self._asked.add(id(tensor))
        self._used[id(known[1])] = known[1]
        self._unused.pop(id(known[1]), None)
        return known[1]

    def follow(self, call: OpCall) -> None:
        """Passes numbers on to the results of a call; pins their axis where the call does something else with them."""
        asked, self._asked = self._asked, set()
        if not self._known:
            return
        for tensor in call.operands:
            if id(tensor) not in self._known or id(tensor) in asked or call.func in _NO_VALUES:
                continue
            _, dim, kind = self._known[id(tensor)]
            if kind == "position" and call.func in _MOVES and tensor is call.args[0] and call.outs[0].dtype in _EXACT:
                self.state(call.outs[0], dim, kind)
            else:
                self._elements.pin(dim, f"{call.name} takes numbers of its positions")

    def leave(self, tensors: Iterable[torch.Tensor], reason: str) -> None:
        """Pins the axes of numbers that go where nothing follows them."""
        for tensor in tensors:
            if id(tensor) in self._known:
                self._elements.pin(self._known[id(tensor)][1], reason)

    def finish(self) -> None:
        """Pins axes whose numbers nothing is looked up by: the largest channels, by value, are no experts."""
        for dim, node in self._unused.values():
            self._elements.node = node
            self._elements.pin(dim, "topk chooses among its positions, and nothing is looked up by their numbers")


def is_reached(source: torch.Tensor, node: fx.Node | None, module: nn.Module | None, given: Any, calls: Iterable[OpCall]) -> bool:
    """Whether a mask before ``node`` makes ``source`` ``-inf`` and nothing else that the node reads: a softmax or ``topk`` of the
    node's first operand, or of a copy in another type."""
    if not source.is_floating_point() or (node is not None and not _is_plain(node, module)):
        return False
    found = {id(given[0][0] if given and given[0] else None)}
    for call in calls:
        if call.func is aten._to_copy.default and id(call.args[0]) in found and call.outs[0].is_floating_point():
            found.add(id(call.outs[0]))
    return id(source) in found


def _is_plain(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_module":
        return type(module) in (nn.Softmax, nn.LogSoftmax)
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    return name.strip("_").removeprefix("special_") in ("softmax", "log_softmax", "safe_softmax", "topk")


def pin_unfit_choices(elements: Elements, axes: list[AxisRecord], solution: Solution) -> bool:
    """Pins axes that are chosen among, but whose positions are no units of their own; whether there are any."""
    pinned = False
    for each in elements.exclusions:
        classes = solution.label[each.ids]
        if each.least == 0 or solution.pinned[classes].all():
            continue
        reason = _unfit(classes, axes, solution)
        if reason:
            elements.node = each.node
            elements.pin((Factor(len(each.ids), each.ids),), reason)
            pinned = True
    return pinned


def _unfit(classes: np.ndarray, axes: list[AxisRecord], solution: Solution) -> str:
    if solution.derived[classes].any() or any(np.isin(f, classes).any() for p in solution.products for f in p.factors):
        return "topk chooses among positions that are a product (groups of experts)"
    if len(np.unique(classes)) < len(classes):
        return "topk chooses among positions that are removed together"
    for axis in axes:
        inside = np.isin(solution.label[axis.ids], classes)
        if inside.any() and not inside.all():
            return f"topk chooses among some positions of '{axis.tensor}:{axis.dim}'"
    return ""


def least_of(elements: Elements, solution: Solution) -> np.ndarray:
    """How many positions must stay for the choices among them, int64, one per class; 0: nothing chooses among them."""
    least = np.zeros(solution.count, dtype=np.int64)
    for each in elements.exclusions:
        classes = solution.label[each.ids]
        least[classes] = np.maximum(least[classes], each.least)
    return least


def too_few(groups: Iterable[Group], kept: np.ndarray) -> Iterator[tuple[Group, int]]:
    """Groups that keep fewer units than are chosen of them, with the number; ``kept``: bool, one per unit."""
    for group in groups:
        count = int(kept[group.units].sum()) if group.chosen else 0
        if count < group.chosen:
            yield group, count
