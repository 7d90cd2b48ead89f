"""The solved analysis as plain data for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from stp_fx.analysis.solved import Solved
from stp_fx.rules import TensorDims
from stp_fx.views.drawing import Call, Drawing

__all__ = ["drawing"]


def drawing(solved: Solved, kept: np.ndarray | None = None) -> Drawing:
    """Calls that pass no tensor on (sizes, indices) are left out. ``kept`` flags the units that a plan keeps."""
    passing = {name for name, value in solved.found.values.items() if any(True for _ in _tensors(value))}
    group_of = np.zeros(solved.units, dtype=np.int64)
    for group in solved.groups:
        group_of[group.units] = group.index
    known: dict[int, frozenset[int]] = {}
    stored = _by_module(solved)
    shown = [n for n in solved.found.flow if n.name in passing or not n.op.startswith(("call", "get"))]
    groups = [(_carried(solved, group_of, known, n.name), stored.get(n.path, frozenset())) for n in shown]
    calls = tuple(Call(n.name, n.op, n.call, n.path, n.inputs, n.scopes, *pair) for n, pair in zip(shown, groups, strict=True))
    removed = () if kept is None else tuple(1 - float(kept[group.units].mean()) for group in solved.groups)
    return Drawing(calls, tuple((group.name, group.size) for group in solved.groups), removed)


def _tensors(value: Any) -> Iterator[TensorDims]:
    if isinstance(value, TensorDims):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _carried(solved: Solved, group_of: np.ndarray, known: dict[int, frozenset[int]], name: str) -> frozenset[int]:
    """The groups whose units the node's value holds; ``known`` has those of arrays of elements, which recur, by their id."""
    dims = [dim for tensor in _tensors(solved.found.values.get(name)) for dim in tensor.dims]
    found: set[int] = set()
    for ids in (factor.ids for dim in dims for factor in dim if factor.ids is not None):
        if id(ids) not in known:
            _, units = solved.touched.of(solved.label[ids[ids >= 0].ravel()])
            known[id(ids)] = frozenset(np.flatnonzero(np.bincount(group_of[units], minlength=1)).tolist())
        found |= known[id(ids)]
    return frozenset(found)


def _by_module(solved: Solved) -> dict[str, frozenset[int]]:
    """The groups that cut a parameter of a module, by the module's path."""
    found: dict[str, set[int]] = {}
    for group in solved.groups:
        for member in group.members:
            path = member.axis.tensor
            while path := path.rpartition(".")[0]:
                found.setdefault(path, set()).add(group.index)
    return {path: frozenset(groups) for path, groups in found.items()}
