"""Answers in words: why an axis is pinned, which channels are removed together, what a group is."""

from __future__ import annotations

from typing import Any

import numpy as np

from stp_fx.analysis.groups import Group
from stp_fx.analysis.pins import pin_reasons, pinned_axes
from stp_fx.analysis.propagated import AxisRecord
from stp_fx.analysis.solved import Solved
from stp_fx.checks import is_a, is_whole, shown
from stp_fx.errors import InputError
from stp_fx.rules import Dim, TensorDims, dim_size
from stp_fx.text import did_you_mean, listed

__all__ = ["explain"]

_SHOWN = 12
_PARTS = (("out", "outputs of"), ("both", "channels of the depthwise"), ("in", "inputs of"))


def explain(solved: Solved, name: str | None = None, index: int | None = None) -> str:
    """See :meth:`ChannelGraph.explain`."""
    if name is None:
        return _explain_graph(solved)
    if not is_a(name, str):
        raise InputError(f"`name` is the name of an axis, tensor, module, group, node or reason; got {shown(name)}")
    if index is not None and not is_whole(index):
        raise InputError(f"`index` is a position along an axis, a whole number; got {shown(index)}")
    axes = _axes_named(solved, name)
    groups = [group for group in solved.groups if group.name == name] if index is None else []
    if not axes and not groups:
        return _explain_other(solved, name, index)
    if index is not None and len(axes) > 1:
        outputs = [a for a in axes if a.side in ("out", "both")]
        axes = (outputs or axes)[:1]
    whole = [_explain_axis(solved, axis, index) for axis in axes] if _is_few(solved, name) else _explain_many(solved, name, axes)
    return "\n".join(whole + [_explain_group(solved, group) for group in groups])


def _axes_named(solved: Solved, name: str) -> list[AxisRecord]:
    """The axes of a tensor, one axis (``name:dim``), or those of all tensors in a module."""
    tensor, _, dim = name.rpartition(":")
    tensor = solved.found.aliases.get(tensor, tensor)
    whole = solved.found.aliases.get(name, name)
    exact = [a for a in solved.found.axes if a.tensor == whole or (dim.isdigit() and (a.tensor, a.dim) == (tensor, int(dim)))]
    return exact or [a for a in solved.found.axes if a.tensor.startswith(name + ".")]


def _is_few(solved: Solved, name: str) -> bool:
    """Whether the name stands for one tensor, one axis, or a module that holds its tensors itself."""
    inside = {a.tensor.removeprefix(name + ".") for a in solved.found.axes if a.tensor.startswith(name + ".")}
    return not any("." in rest for rest in inside)


def _explain_other(solved: Solved, name: str, index: int | None) -> str:
    """A scalar tensor, a reason, a node of the graph; or an error that names what is close."""
    tensor, _, dim = name.rpartition(":")
    shape = solved.found.shapes.get(name, solved.found.shapes.get(tensor) if dim.isdigit() else None)
    if shape is not None and len([size for size in shape if size > 1]) == 0:
        raise InputError(f"{name!r} has shape {shape}: no axis longer than one")
    if shape is not None:
        raise InputError(f"{name!r} has shape {shape}: no axis longer than one at dim {dim}")
    pinned = pinned_axes(solved)
    if name in pinned:
        return f"{name}: {len(pinned[name])} axes: {', '.join(pinned[name])}"
    node = name if name in solved.found.values else name.replace(".", "_")
    if node in solved.found.values and index is None:
        return _explain_node(solved, node)
    known = {a.tensor for a in solved.found.axes} | {g.name for g in solved.groups} | set(solved.found.values) | set(pinned)
    known |= {prefix for a in solved.found.axes for prefix in _prefixes(a.tensor)}
    hint = did_you_mean(name, known, "; explain() without a name gives an overview")
    raise InputError(f"no parameter, axis, module, node, group or reason {name!r}{hint}")


def _prefixes(tensor: str) -> list[str]:
    parts = tensor.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _explain_graph(solved: Solved) -> str:
    inexact = sum(not group.exact for group in solved.groups)
    lines = [
        f"{len(solved.groups)} groups of {solved.units:,} units over {len(solved.axes)} axes"
        + (f"; masking is not removing in {inexact} of them" if inexact else "")
    ]
    lines += [f"{len(axes)} axes pinned: {reason} (e.g. {axes[0]})" for reason, axes in pinned_axes(solved).items()]
    lines += [
        f"no rule for {op}, at {', '.join(nodes[:3])}: what it touches is pinned" for op, nodes in solved.found.unknown.items()
    ]
    return "\n".join(lines)


def _explain_many(solved: Solved, name: str, axes: list[AxisRecord]) -> list[str]:
    """A module of modules: by group what is cut in it, by reason what is pinned."""
    names = {(axis.tensor, axis.dim) for axis in axes}
    lines = [f"{name}: {len(axes)} axes of {len({axis.tensor for axis in axes})} tensors"]
    for group in solved.groups:
        inside = [m.axis for m in group.members if (m.axis.tensor, m.axis.dim) in names]
        if inside:
            lines.append(f"  group '{group.name}' of {group.size} units cuts {listed([axis.name for axis in inside], _SHOWN)}")
    for reason, pinned in pinned_axes(solved).items():
        inside = [axis for axis in pinned if tuple(axis.rsplit(":", 1)) in {(t, str(d)) for t, d in names}]
        if inside:
            lines.append(f"  pinned, {reason}: {listed(inside, _SHOWN)}")
    return lines


def _explain_node(solved: Solved, node: str) -> str:
    value = solved.found.values[node]
    if not isinstance(value, TensorDims):
        return f"node '{node}': no single tensor, so nothing to say of its dimensions"
    lines = [f"node '{node}', a tensor of {tuple(map(dim_size, value.dims))}"]
    for number, dim in enumerate(value.dims):
        if any(factor.ids is not None for factor in dim):
            lines.append(f"  dim {number}: {' x '.join(_explain_factor(solved, (factor,)) for factor in dim)}")
    return "\n".join(lines) if len(lines) > 1 else lines[0] + ": no dimension of it can be cut"


def _explain_factor(solved: Solved, dim: Dim) -> str:
    ids: Any = dim[0].ids
    if ids is None:
        return f"{dim[0].size} fixed"
    classes = solved.label[ids]
    _, units = solved.touched.of(classes)
    names = [group.name for group in solved.groups if np.isin(group.units, units).any()]
    pinned = int(solved.solution.pinned[classes].sum())
    parts = [f"{dim[0].size} in group {' and '.join(map(repr, names))}"] if names else []
    if pinned:
        parts.append(f"{pinned} pinned: {'; '.join(pin_reasons(solved, classes[solved.solution.pinned[classes]]))}")
    return ", ".join(parts)


def _explain_axis(solved: Solved, axis: AxisRecord, index: int | None) -> str:
    head = f"{axis.tensor}:{axis.dim} ({len(axis.ids)} positions, {axis.role}{' ' + axis.side if axis.side else ''})"
    classes = solved.label[axis.ids]
    if index is not None:
        if not -len(classes) <= index < len(classes):
            raise InputError(f"{axis.tensor}:{axis.dim} has {len(classes)} positions; {index} is out of range")
        classes = classes[[index]]
        head = f"{axis.tensor}:{axis.dim}[{index % len(axis.ids)}]"
    pinned = solved.solution.pinned[classes]
    parts = []
    touching = [(g, m) for g in solved.groups for m in g.members if (m.axis.tensor, m.axis.dim) == (axis.tensor, axis.dim)]
    if index is not None:
        touching = [(g, m) for g, m in touching if (m.index == index % len(axis.ids)).any()]
    if pinned.any():
        parts.append(f"{int(pinned.sum())} pinned: {'; '.join(pin_reasons(solved, classes[pinned]))}")
    for group, member in touching:
        parts.append(_membership(group, member.index, member.unit, axis, index))
    left = ~pinned
    for _, member in touching:
        left[member.index if index is None else 0] = False
    if left.any():
        parts.append(f"{int(left.sum())} pinned through their factors: {'; '.join(pin_reasons(solved, classes[left]))}")
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
    return f"unit {unit} of group '{group.name}'{note}; with it go {listed(together, _SHOWN)}"


def _explain_group(solved: Solved, group: Group) -> str:
    lines = [f"group '{group.name}': {group.size} units"]
    weights = [m.axis for m in group.members if m.axis.role == "weight"]
    for side, words in _PARTS:
        tensors = [axis.tensor.removesuffix(".weight") for axis in weights if axis.side == side]
        if tensors:
            lines.append(f"{words} {listed(list(dict.fromkeys(tensors)), _SHOWN)}")
    rest = [m.axis.name for m in group.members if m.axis not in weights or m.axis.side not in ("out", "both", "in")]
    if rest:
        lines.append(f"with them {listed(rest, _SHOWN)}")
    for product in solved.products:
        if any(group.index in factor for factor in product.factors):
            sizes = " x ".join(map(str, product.sizes))
            lines.append(f"one factor of {product.axis}, {sizes}: {_factors(solved, product.factors)}")
    lines.append("masking equals removing" if group.exact else "not exact: " + "; ".join(group.notes))
    return "\n  ".join(lines)


def _factors(solved: Solved, factors: tuple[tuple[int, ...], ...]) -> str:
    return " x ".join(" and ".join(f"'{solved.groups[k].name}'" for k in factor) or "pinned" for factor in factors)
