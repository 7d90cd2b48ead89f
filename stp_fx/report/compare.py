"""Two graphs side by side: what they cost, and which groups of the first the second has less of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.bypass import tensor_names
from stp_fx.analysis.cost import cost
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.analysis.survivors import Survivors
from stp_fx.errors import InputError
from stp_fx.ir.provenance import is_mask_buffer, provenance_of
from stp_fx.report.file_size import safetensors_bytes
from stp_fx.report.paired import paired_latency
from stp_fx.report.report import GroupChange, Report
from stp_fx.selection import PrunePlan

__all__ = ["compare", "units_left"]


def compare(before: fx.GraphModule, after: fx.GraphModule, *, latency: Any = False) -> Report:
    """Compares a graph with what passes made of it: MACs, parameters, size on disk, the channels of every group.

    ``latency`` runs both graphs in turn and measures them too: True for random inputs of the recorded example's shapes, or the
    inputs to measure with (a tensor, or a tuple of arguments). Sizes on disk are of the state dicts, as safetensors writes them.

    Raises:
        InputError: ``after`` does not come from ``before``: a tensor is missing, or its length is not that of its plan.
    """
    graph = analyze(before)
    left = _Left(before, after)
    _check(before, after, graph, left)
    masked = provenance_of(before).masked
    unmasked = graph.survivors(None if masked is None else masked.without_blocks(), partial=True)
    changes = tuple(_changes(after, graph, left, unmasked))
    blocks = tuple(sorted(left.blocks))
    measured = None
    if latency is not False:
        measured = paired_latency(before, after, None if latency is True else latency)
    size = safetensors_bytes(before), safetensors_bytes(after)
    return Report(cost(before), cost(after), changes, size, measured, blocks)


def units_left(before: fx.GraphModule, after: fx.GraphModule) -> np.ndarray:
    """Which units of ``before`` are left in ``after``, neither removed nor masked (bool, one a unit).

    Raises:
        InputError: ``after`` does not come from ``before``.
    """
    graph, left = analyze(before), _Left(before, after)
    _check(before, after, graph, left)
    units: np.ndarray = np.array(graph.survivors(provenance_of(before).masked, partial=True).units)
    for group in graph.groups:
        units[group.units] &= _alive_units(group, left)
    return units


class _Left:
    """Which positions of the axes of ``before`` are left in ``after``, whatever has been removed or masked in either."""

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        self._removed = _removed(before), _removed(after)
        masked = provenance_of(after).masked
        self._after = self._removed[1] if masked is None else self._removed[1].then(masked)
        self._held = tensor_names(after)
        hidden = provenance_of(before).masked
        self.blocks = set(self._after.blocks) - set(self._removed[0].blocks) - set(() if hidden is None else hidden.blocks)

    def has(self, tensor: str) -> bool:
        """Whether ``after`` has a tensor, or lacks it for another reason than a block that was removed."""
        return tensor in self._held or self._removed[0].blocks == self._removed[1].blocks

    def of(self, key: tuple[str, int], size: int, *, masked: bool = True) -> np.ndarray | None:
        """Bool, one a position of the axis in ``before``; None if ``after`` has positions there that ``before`` has not."""
        positions = self._removed[0].kept.get(key, np.arange(self._removed[0].sizes.get(key, size)))
        kept = (self._after if masked else self._removed[1]).kept.get(key)
        if kept is None:
            return None if key in self._removed[0].kept else np.ones(size, dtype=bool)
        return np.isin(positions, kept) if len(positions) == size and np.isin(kept, positions).all() else None


def _removed(gm: fx.GraphModule) -> PrunePlan:
    plan = provenance_of(gm).plan
    return PrunePlan({}, {}) if plan is None else plan


def _check(before: fx.GraphModule, after: fx.GraphModule, graph: ChannelGraph, left: _Left) -> None:
    tensors = dict(after.named_parameters(remove_duplicate=False)) | dict(after.named_buffers(remove_duplicate=False))
    for axis in graph.axes:
        if is_mask_buffer(axis.tensor) or not left.has(axis.tensor):
            continue
        tensor = tensors.get(axis.tensor)
        if tensor is None:
            raise InputError(f"the second graph has no '{axis.tensor}', so it does not come from the first")
        kept = left.of((axis.tensor, axis.dim), axis.size, masked=False)
        expected = None if kept is None else int(kept.sum())
        found = tensor.shape[axis.dim] if axis.dim < tensor.dim() else 1
        if found != expected:
            planned = "positions that the first has not" if kept is None else f"{expected} positions"
            raise InputError(
                f"the second graph does not come from the first: '{axis.tensor}' dim {axis.dim} has {found} positions, its plan "
                f"leaves {planned} of {axis.size}"
            )


def _changes(after: fx.GraphModule, graph: ChannelGraph, left: _Left, unmasked: Survivors) -> Iterator[GroupChange]:
    """The groups that lost units, with the MACs and parameters that the loss of theirs alone saves."""
    marks = _compensations(after)
    for group in graph.groups:
        if not any(left.has(member.axis.tensor) for member in group.members):
            continue  # it went with a block
        was = unmasked.units[group.units]
        lost = was & ~_alive_units(group, left)
        if lost.any():
            removed = ~unmasked.units
            removed[group.units[lost]] = True
            without = graph.survivors_without(removed)
            saved = unmasked.macs - without.macs, unmasked.params - without.params
            yield GroupChange(group.name, int(was.sum()), int((was & ~lost).sum()), *saved, marks.get(group.name))


def _alive_units(group: Group, left: _Left) -> np.ndarray:
    """Bool, one a unit of the group: those that have a position left."""
    alive = np.zeros(group.size, dtype=bool)
    member = next(m for m in group.members if not is_mask_buffer(m.axis.tensor) and left.has(m.axis.tensor))
    kept = left.of((member.axis.tensor, member.axis.dim), member.axis.size)
    alive[member.unit if kept is None else member.unit[kept[member.index]]] = True
    return alive


def _compensations(after: fx.GraphModule) -> dict[str, str]:
    report = provenance_of(after).report
    return {} if report is None else {g.name: g.compensation or "no" for g in report.groups if g.removed}
