"""The content of the explorer's page, as plain data for JSON: boxes in modules, groups, axes, costs before and after.

``boxes``, ``scopes``, ``groups``, ``axes``, ``maps`` and ``reasons`` are lists; what refers to an item of them holds its index.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import parameter_names
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Axis, Group
from stp_fx.analysis.plan import PrunePlan
from stp_fx.analysis.survivors import Survivors
from stp_fx.ir.provenance import is_mask_buffer
from stp_fx.rules import TensorDims, dim_size
from stp_fx.views.boxes import Box, Boxes, boxes, colours

__all__ = ["SCHEMA", "Shown", "explored", "runs_of"]

SCHEMA = 1
_RUNS = 4096
"""A longer list of positions is left out, and the page says so."""
_POINTS = 64
"""Points of a damage curve."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """The optional content of the page, beside the structure of the graph.

    ``units`` flags the units that are kept (bool, one per unit); ``removed`` is what had been removed from the graph before, in
    original indices; ``seconds`` of every node, before and after; ``scores`` (lowest, highest) and ``damages`` (error of the
    output when 0, 1, ... units are removed) by group name.
    """

    units: np.ndarray
    removed: PrunePlan = dataclasses.field(default_factory=lambda: PrunePlan({}, {}))
    seconds: tuple[Mapping[str, float], ...] = ()
    scores: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict[str, tuple[float, float]])
    damages: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict[str, np.ndarray])


def explored(gm: fx.GraphModule, shown: Shown) -> dict[str, Any]:
    """The structure of a captured graph, with what ``shown`` adds, as plain data: numbers, texts, lists and dicts."""
    return _Explored(gm, shown).data()


def runs_of(index: np.ndarray, unit: np.ndarray) -> list[list[int]] | None:
    """Positions and their units (int64, sorted by position) as runs ``[position, count, unit, step]``: ``count`` positions in a
    row, of which each next one belongs to the unit ``step`` further. None for more runs than a page should hold."""
    step, follows = np.diff(unit), np.diff(index) == 1
    changes = np.flatnonzero((np.diff(step) != 0) | (np.diff(follows.astype(np.int8)) != 0)) + 1
    ends = np.concatenate([changes, [len(step)]])  # of runs of equal steps, by the pair of positions after them
    runs: list[list[int]] = []
    at = 0
    while at < len(index):
        last = at
        if at < len(step) and follows[at]:
            last = int(ends[np.searchsorted(ends, at, side="right")])
        runs.append([int(index[at]), last - at + 1, int(unit[at]), int(step[at]) if last > at else 0])
        if len(runs) > _RUNS:
            return None
        at = last + 1
    return runs


class _Explored:
    """One graph while its data are put together."""

    def __init__(self, gm: fx.GraphModule, shown: Shown) -> None:
        self._gm, self._shown = gm, shown
        self._graph: ChannelGraph = analyze(gm)
        self._left: Survivors = self._graph.survivors_without(~shown.units)
        self._before = self._graph.survivors()
        self._axes: list[Axis] = [axis for axis in self._graph.axes if not is_mask_buffer(axis.tensor)]
        self._axis_number = {axis.name: k for k, axis in enumerate(self._axes)}
        self._parameters = frozenset(parameter_names(gm))
        self._maps: dict[bytes, int] = {}
        self._runs: list[list[list[int]] | None] = []
        self._reasons: dict[str, int] = {}
        self._read = {node.name: str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}

    def data(self) -> dict[str, Any]:
        found = boxes(self._graph.drawing())
        groups = self._groups(colours(found, len(self._graph.groups)))
        axes = self._axis_data()
        classes = self._classes()
        scopes = [{"title": s.title, "parent": s.parent, "class": s.made_up or classes.get(s.path, "")} for s in found.scopes]
        return {
            "schema": SCHEMA,
            "scopes": scopes,
            "boxes": self._boxes(found),
            "edges": [[source, target, sorted(groups)] for source, target, groups in found.edges],
            "groups": groups,
            "axes": axes,
            "maps": self._runs,
            "reasons": list(self._reasons),
            "pinned": [
                [reason, [self._axis_number[name] for name in names if name in self._axis_number]]
                for reason, names in self._graph.pinned.items()
            ],
            "unknown": [[op, list(nodes)] for op, nodes in self._graph.unknown.items()],
        }

    # -- boxes -----------------------------------------------------------------------------------------------------

    def _boxes(self, found: Boxes) -> list[dict[str, Any]]:
        by_tensor: dict[str, list[int]] = {}
        for k, axis in enumerate(self._axes):
            by_tensor.setdefault(axis.tensor, []).append(k)
        tensors = self._tensors_of_modules()
        counted: set[str] = set()
        result: list[dict[str, Any]] = []
        for box in found.boxes:
            names = list(dict.fromkeys(n for call in box.calls for n in self._tensors(call.name, call.path, tensors)))
            new = [name for name in names if name not in counted]
            counted.update(new)
            result.append({
                "title": box.first.path or _layer(names) or box.first.name,
                "scope": box.scope,
                "calls": [call.call for call in box.calls if call.op.startswith("call")] or [_plain(box)],
                "nodes": [call.name for call in box.calls],
                "carried": sorted(box.carried),
                "touched": sorted(box.touched),
                "axes": [k for name in names for k in by_tensor.get(name, ())],
                "params": [sum(sizes) for sizes in zip(*(self._elements(n) for n in new))] or [0, 0],
                "macs": [sum(s.cost.per_node.get(c.name, 0) for c in box.calls) for s in (self._before, self._left)],
                "seconds": [sum(times.get(c.name, 0.0) for c in box.calls) for times in self._shown.seconds],
                "shape": self._shape(box.calls[-1].name),
            })  # fmt: skip
        return result

    def _tensors_of_modules(self) -> dict[str, list[str]]:
        """Parameters and buffers by each module that they are in, tied ones under their first name."""
        inside: dict[str, dict[str, None]] = {}
        for name in self._graph.shapes:
            path = name
            while path := path.rpartition(".")[0]:
                inside.setdefault(path, {})[self._graph.first_name(name)] = None
        return {path: list(names) for path, names in inside.items()}

    def _tensors(self, node: str, path: str, inside: Mapping[str, list[str]]) -> list[str]:
        if path:
            return [name for name in inside.get(path, ()) if not is_mask_buffer(name)]
        read = self._read.get(node)
        return [self._graph.first_name(read)] if read is not None and read in self._graph.shapes else []

    def _elements(self, name: str) -> tuple[int, int]:
        """Elements of a parameter before anything was removed from it and after; none for a buffer."""
        if name not in self._parameters:
            return 0, 0
        before, after = list(self._graph.shapes[name]), list(self._graph.shapes[name])
        for dim in range(len(after)):
            before[dim] = self._shown.removed.sizes.get((name, dim), before[dim])
            after[dim] = len(self._left.axes.get((name, dim), range(after[dim])))
        return int(np.prod(before, dtype=np.int64)), int(np.prod(after, dtype=np.int64))

    def _shape(self, node: str) -> list[list[int]]:
        """The sizes of a tensor before and after; empty for anything else."""
        value = self._graph.value(node)
        if not isinstance(value, TensorDims):
            return []
        after = [int(self._left.flags(dim).sum()) if any(f.ids is not None for f in dim) else dim_size(dim) for dim in value.dims]
        return [[dim_size(dim) for dim in value.dims], after]

    def _classes(self) -> dict[str, str]:
        """The class of every module that a call was traced in, by its path."""
        found: dict[str, str] = {}
        for node in self._gm.graph.nodes:
            stack: dict[str, tuple[Any, Any]] = node.meta.get("nn_module_stack") or {}
            for path, kind in stack.values():
                found[str(path)] = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2].strip("'>")
        return found

    # -- groups and axes -------------------------------------------------------------------------------------------

    def _groups(self, colour: list[int]) -> list[dict[str, Any]]:
        short = [group.name.rpartition(":")[0].removesuffix(".weight") for group in self._graph.groups]
        result: list[dict[str, Any]] = []
        for group, name in zip(self._graph.groups, short, strict=True):
            kept = self._shown.units[group.units]
            products = [product for product in self._graph.products if any(group.index in f for f in product.factors)]
            members = [m for m in group.members if m.axis.name in self._axis_number]
            result.append({
                "name": group.name,
                "short": name if name and short.count(name) == 1 else group.name,
                "colour": colour[group.index],
                "units": group.size,
                "kept": int(kept.sum()),
                "of": self._original(group),
                "left": None if kept.all() else base64.b64encode(np.packbits(kept).tobytes()).decode(),
                "exact": group.exact,
                "notes": list(group.notes),
                "members": [[self._axis_number[m.axis.name], self._map(m.index, m.unit)] for m in members],
                "factors": [f"{product.axis} = {' x '.join(map(str, product.sizes))}" for product in products],
                "scores": list(self._shown.scores.get(group.name, ())),
                "damage": _sampled(self._shown.damages.get(group.name)),
            })  # fmt: skip
        return result

    def _original(self, group: Group) -> int:
        """How many units the group had before anything was removed, where an axis of its own tells."""
        for member in group.members:
            size = self._shown.removed.sizes.get((member.axis.tensor, member.axis.dim))
            if size is not None and len(member.index) == member.axis.size and size * group.size % member.axis.size == 0:
                return size * group.size // member.axis.size
        return group.size

    def _map(self, index: np.ndarray, unit: np.ndarray) -> int:
        key = index.tobytes() + b"|" + unit.tobytes()
        if key not in self._maps:
            self._maps[key] = len(self._runs)
            self._runs.append(runs_of(index, unit))
        return self._maps[key]

    def _axis_data(self) -> list[dict[str, Any]]:
        touching: dict[int, list[int]] = {}
        free = [np.zeros(axis.size, dtype=bool) for axis in self._axes]
        for group in self._graph.groups:
            for member in group.members:
                k = self._axis_number.get(member.axis.name)
                if k is not None:
                    touching.setdefault(k, []).append(group.index)
                    free[k][member.index] = True
        result: list[dict[str, Any]] = []
        for k, axis in enumerate(self._axes):
            pinned = axis.size - int(free[k].sum())
            reasons = self._graph.pin_reasons(axis.name) if pinned else []
            result.append({
                "name": axis.name,
                "size": axis.size,
                "of": self._shown.removed.sizes.get((axis.tensor, axis.dim), axis.size),
                "kept": len(self._left.axes.get((axis.tensor, axis.dim), range(axis.size))),
                "is": f"{axis.role} {axis.side}".strip(),
                "groups": touching.get(k, []),
                "pinned": pinned,
                "why": [self._reasons.setdefault(reason, len(self._reasons)) for reason in reasons],
            })  # fmt: skip
        return result


def _layer(tensors: list[str]) -> str:
    """The module whose weight a function reads, as an attention that calls ``F.linear`` does; empty if there is none."""
    return next((name.removesuffix(".weight") for name in tensors if name.endswith(".weight")), "")


def _plain(box: Box) -> str:
    return {"placeholder": "input", "output": "output", "get_attr": "parameter"}.get(box.first.op, box.first.op)


def _sampled(curve: np.ndarray | None) -> list[list[float]]:
    """(units removed, damage) at a few places; empty without a curve."""
    if curve is None:
        return []
    last = len(curve) - 1
    at = sorted({round(k * last / (_POINTS - 1)) for k in range(_POINTS)})
    return [[k, float(curve[k])] for k in at]
