"""Answers in words: why is this axis pinned, what goes with channel 5 of this layer."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import numpy as np

from stp_fx.analysis.groups import Group
from stp_fx.analysis.propagate import AxisRecord
from stp_fx.errors import InputError

if TYPE_CHECKING:
    from stp_fx.analysis.graph import ChannelGraph

__all__ = ["explain", "pin_reasons"]

_SHOWN = 12


def explain(graph: ChannelGraph, name: str, index: int | None = None) -> str:
    """See :meth:`ChannelGraph.explain`."""
    for group in graph.groups:
        if group.name == name and index is None and not any(name in (axis.tensor, axis.name) for axis in graph.axes):
            return _explain_group(graph, group)
    axes = _axes_named(graph, name)
    if index is not None and len(axes) > 1:
        outputs = [a for a in axes if a.side in ("out", "both")]
        axes = (outputs or axes)[:1]
    return "\n".join(_explain_axis(graph, axis, index) for axis in axes)


def _axes_named(graph: ChannelGraph, name: str) -> list[AxisRecord]:
    tensor, _, dim = name.rpartition(":")
    tensor = graph.found.aliases.get(tensor, tensor)
    whole = graph.found.aliases.get(name, name)
    exact = [a for a in graph.found.axes if a.tensor == whole or (dim.isdigit() and (a.tensor, a.dim) == (tensor, int(dim)))]
    inside = exact or [a for a in graph.found.axes if a.tensor.startswith(name + ".")]
    if inside:
        return inside
    if name in graph.found.shapes or (dim.isdigit() and tensor in graph.found.shapes):
        raise InputError(
            f"{name!r} has shape {graph.found.shapes.get(name, graph.found.shapes.get(tensor))}: no axis longer than one"
        )
    known = sorted({a.tensor for a in graph.found.axes} | {g.name for g in graph.groups})
    close = difflib.get_close_matches(name, known, n=3)
    raise InputError(
        f"no parameter, axis, module or group {name!r}" + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
    )


def _explain_axis(graph: ChannelGraph, axis: AxisRecord, index: int | None) -> str:
    head = f"{axis.tensor}:{axis.dim} ({len(axis.ids)} positions, {axis.role}{' ' + axis.side if axis.side else ''})"
    classes = graph.solution.label[axis.ids]
    if index is not None:
        if not -len(classes) <= index < len(classes):
            raise InputError(f"{axis.tensor}:{axis.dim} has {len(classes)} positions; {index} is out of range")
        classes = classes[[index]]
        head = f"{axis.tensor}:{axis.dim}[{index % len(axis.ids)}]"
    pinned = graph.solution.pinned[classes]
    parts = []
    touching = [(g, m) for g in graph.groups for m in g.members if (m.axis.tensor, m.axis.dim) == (axis.tensor, axis.dim)]
    if index is not None:
        touching = [(g, m) for g, m in touching if (m.index == index % len(axis.ids)).any()]
    if pinned.any():
        parts.append(f"{int(pinned.sum())} pinned: {'; '.join(pin_reasons(graph, classes[pinned]))}")
    for group, member in touching:
        parts.append(_membership(group, member.index, member.unit, axis, index))
    left = ~pinned
    for _, member in touching:
        left[member.index if index is None else 0] = False
    if left.any():
        parts.append(f"{int(left.sum())} pinned through their factors: {'; '.join(pin_reasons(graph, classes[left]))}")
    return head + ": " + "\n  ".join(parts)


def _membership(group: Group, positions: np.ndarray, units: np.ndarray, axis: AxisRecord, index: int | None) -> str:
    note = "" if group.exact else f" (not exact: {'; '.join(group.notes)})"
    if index is None:
        return f"{len(positions)} in group '{group.name}' of {group.size} units{note}"
    unit = int(units[positions == index % len(axis.ids)][0])
    together = []
    for member in group.members:
        where = member.index[member.unit == unit]
        shown = ", ".join(map(str, where[:8].tolist())) + (", ..." if len(where) > 8 else "")
        together.append(f"{member.axis.name}[{shown}]")
    more = f" and {len(together) - _SHOWN} more" if len(together) > _SHOWN else ""
    return f"unit {unit} of group '{group.name}'{note}; with it go {', '.join(together[:_SHOWN])}{more}"


def pin_reasons(graph: ChannelGraph, classes: np.ndarray) -> list[str]:
    """Why the given classes are pinned: what was said of them, of the factors they split into, or of what they split."""
    wanted = np.zeros(graph.solution.count, dtype=bool)
    wanted[classes] = True
    reasons = _said(graph, wanted)
    if reasons:
        return reasons
    for product in graph.solution.products:
        if wanted[product.classes].any():
            for factor in product.factors:
                wanted[factor] = True
        elif any(wanted[factor].any() for factor in product.factors):
            wanted[product.classes.ravel()] = True
    reasons = _said(graph, wanted)
    return [f"{reason}, through an axis it is a factor of" for reason in reasons] or [
        "coupled to positions that cannot be removed"
    ]


def _said(graph: ChannelGraph, wanted: np.ndarray) -> list[str]:
    reasons: dict[str, None] = {}
    for note in graph.found.elements.pins:
        if note.node and wanted[graph.solution.label[note.ids.ravel()]].any():
            reasons[f"{note.reason} (node '{note.node}')"] = None
    return list(reasons)[:4]


def _explain_group(graph: ChannelGraph, group: Group) -> str:
    axes = ", ".join(f"{m.axis.name} ({len(m.index)})" for m in group.members[:_SHOWN])
    more = f" and {len(group.members) - _SHOWN} more" if len(group.members) > _SHOWN else ""
    exact = "masking equals removing" if group.exact else "not exact: " + "; ".join(group.notes)
    return f"group '{group.name}': {group.size} units over {axes}{more}; {exact}"
