"""Plans for given units: flagged by the caller, or named as positions of axes together with all that goes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stp_fx.analysis.chosen import too_few
from stp_fx.analysis.explain import explain
from stp_fx.analysis.liveness import flag_whole_factors
from stp_fx.analysis.plan import PrunePlan
from stp_fx.analysis.propagated import AxisRecord
from stp_fx.analysis.solved import Solved, alive_classes, kept_axes, removable, units_along
from stp_fx.checks import shown
from stp_fx.errors import InputError
from stp_fx.ir.provenance import is_mask_buffer
from stp_fx.rules import Factor
from stp_fx.text import clipped, did_you_mean, listed, runs

__all__ = ["plan_for", "plan_removing"]

Removed = Mapping[str, Sequence[int] | np.ndarray]


def plan_removing(solved: Solved, removed: np.ndarray) -> PrunePlan:
    """See :meth:`ChannelGraph.plan_removing`."""
    if removed.shape != (solved.units,) or removed.dtype != bool:
        raise InputError(
            f"`removed` holds one bool for each of the {solved.units} units; got {removed.dtype} of shape {removed.shape}"
        )
    kept = {key: k for key, k in kept_axes(solved, alive_classes(solved, removed)).items() if not is_mask_buffer(key[0])}
    return PrunePlan(kept, {key: len(solved.elements_of[key]) for key in kept})


def plan_for(solved: Solved, removed: Removed) -> PrunePlan:
    """See :meth:`ChannelGraph.plan_for`."""
    if not isinstance(removed, Mapping):
        raise InputError(f"give a mapping of names to indices, such as {{'conv1': [0, 3]}}; got {type(removed).__name__}")
    flags = np.zeros(solved.units, dtype=bool)
    for name, indices in removed.items():
        axis = _axis_named(solved, name)
        flags |= _units_at(solved, axis, _checked(axis, indices))
    _something_is_left(solved, flags)
    return plan_removing(solved, flags)


def _axis_named(solved: Solved, name: str) -> AxisRecord:
    """The axis of that name, or the output axis of a parameter or module."""
    if not isinstance(name, str):
        raise InputError(
            f"an axis is given by the name of a module, a parameter or an axis ('conv1.weight:0'); got {shown(name)}"
        )
    own = [axis for axis in solved.found.axes if not is_mask_buffer(axis.tensor)]
    tensor, _, dim = name.rpartition(":")
    exact = [axis for axis in own if dim.isdigit() and (axis.tensor, axis.dim) == (solved.first_name(tensor), int(dim))]
    if exact:
        return exact[0]
    inside = [axis for axis in own if axis.tensor == solved.first_name(name)]
    prefixes = {alias for alias in solved.found.shapes if alias.startswith(f"{name}.")}
    direct = {solved.first_name(alias) for alias in prefixes if "." not in alias[len(name) + 1 :]}
    beneath = {solved.first_name(alias) for alias in prefixes}
    inside = inside or [a for a in own if a.tensor in direct] or [a for a in own if a.tensor in beneath]
    outputs = [axis for axis in inside if axis.side in ("out", "both")] or inside
    if not outputs:
        known = {axis.tensor for axis in own} | {f"{axis.tensor}:{axis.dim}" for axis in own}
        known |= {axis.tensor.rpartition(".")[0] for axis in own}
        raise InputError(f"no module, parameter or axis {name!r}{did_you_mean(name, known - {''})}")
    first = solved.label[outputs[0].ids]
    if not all(np.array_equal(first, solved.label[axis.ids]) for axis in outputs[1:]):
        names = listed((f"'{axis.tensor}:{axis.dim}'" for axis in outputs), 6)
        raise InputError(f"{name!r} has several axes that do not go together; name one of {names}")
    return outputs[0]


def _checked(axis: AxisRecord, indices: Any) -> np.ndarray:
    """The indices from 0 up, each once, ascending (int64)."""
    size, where = len(axis.ids), f"{axis.tensor}:{axis.dim}"
    try:
        array = np.asarray(indices)
    except ValueError:  # lists of different lengths
        array = np.zeros((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"the indices along {where!r} are a flat sequence of integers; got {clipped(repr(indices))}")
    array = array.astype(np.int64)
    wrong = array[(array < -size) | (array >= size)]
    if len(wrong):
        raise InputError(f"index {wrong[0]} is out of range for {where!r}, an axis of {size} positions")
    return np.unique(array % size)


def _units_at(solved: Solved, axis: AxisRecord, indices: np.ndarray) -> np.ndarray:
    """The units at the given positions (bool, one per unit); of a product, the factors of which all positions are given."""
    classes = solved.label[axis.ids]
    held = np.flatnonzero(~removable(solved, classes[indices]))
    if len(held):
        raise InputError(f"cannot be removed: {explain(solved, f'{axis.tensor}:{axis.dim}', int(indices[held[0]]))}")
    dead = np.zeros(solved.solution.count, dtype=bool)
    seen = np.zeros(solved.solution.count, dtype=bool)
    dead[classes[indices]] = True
    seen[classes] = True
    flag_whole_factors(solved, dead, seen, np.zeros_like(dead))
    removed = dead[solved.unit_class]
    left = indices[alive_classes(solved, removed)[classes[indices]]]
    if len(left):
        raise InputError(_only_together(solved, axis, int(left[0])))
    return _fewest(solved, removed, classes[indices])


def _fewest(solved: Solved, removed: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``removed`` without the units that are not needed to remove the ``wanted`` classes.

    Where a tensor holds only a part of a product, all positions of a column may lie in the row that is meant.
    """
    products = wanted[solved.solution.derived[wanted]]
    if not len(products):
        return removed
    removed = removed.copy()
    _, units = solved.touched.of(products)
    number = np.bincount(units, minlength=solved.units)
    for unit in sorted(np.unique(units[removed[units]]).tolist(), key=lambda unit: number[unit]):
        removed[unit] = False
        if alive_classes(solved, removed)[wanted].any():
            removed[unit] = True
    return removed


def _only_together(solved: Solved, axis: AxisRecord, index: int) -> str:
    """A position of a product is removed with a whole unit of one of its factors: which positions of the axis that would be."""
    at, units = units_along(solved, (Factor(len(axis.ids), axis.ids),))
    classes = solved.label[axis.ids]
    tables = [product.classes for product in solved.solution.products if (product.classes == classes[index]).any()]
    together = np.isin(classes, np.concatenate([table.ravel() for table in tables]))
    at, units = at[together[at]], units[together[at]]
    choices = []
    for unit in units[at == index].tolist():
        group = next(group for group in solved.groups if unit in group.units)
        number = int(np.flatnonzero(group.units == unit)[0])
        choices.append(f"{runs(at[units == unit])} (unit {number} of group '{group.name}')")
    return (
        f"position {index} of '{axis.tensor}:{axis.dim}' is one of a product and is not removed alone; "
        f"give all positions of a unit: {' or '.join(choices)}"
    )


def _something_is_left(solved: Solved, removed: np.ndarray) -> None:
    """No tensor, and no part of one that is split or concatenated, may lose all its positions."""
    alive = alive_classes(solved, removed)
    for (tensor, dim), kept in kept_axes(solved, alive).items():
        if not len(kept):
            size = len(solved.elements_of[tensor, dim])
            raise InputError(f"this removes all {size} positions of '{tensor}:{dim}'; keep at least one")
    for group, kept in too_few(solved.groups, ~removed):
        raise InputError(
            f"this leaves {kept} of the {group.size} experts of group '{group.name}', of which {group.chosen} are chosen for "
            f"every token; keep at least {group.chosen}"
        )
    for ids in solved.found.pieces():
        labels = solved.label[ids]
        if len(labels) and not alive[labels].any():
            units = solved.touched.of(labels)[1]
            group = next(group for group in solved.groups if units[0] in group.units)
            size = len(np.unique(labels))
            raise InputError(f"this removes all {size} channels of a part of a tensor (group '{group.name}'); keep at least one")
