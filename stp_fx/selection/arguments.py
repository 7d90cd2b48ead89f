"""The arguments of a selection, and the errors for everything that is not one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stp_fx.analysis.groups import Group
from stp_fx.checks import is_choice, is_number, is_whole, shown
from stp_fx.errors import InputError
from stp_fx.selection.rounding import GroupLimits
from stp_fx.selection.scope import SCOPES

__all__ = [
    "TARGETS",
    "Cost",
    "check_groups",
    "check_pieces",
    "check_ratio",
    "check_ratios",
    "check_request",
    "check_room",
]

TARGETS = ("channels", "macs", "params", "latency", "memory")

# The cost (MACs, parameters, seconds, bytes) of the network without the units flagged in a bool array [units of the graph].
Cost = Callable[[np.ndarray], float]


def check_ratios(groups: Sequence[Group], ratio: float, ratios: Mapping[int, float]) -> None:
    """Raise :class:`InputError` unless every ratio is in [0, 1)."""
    check_ratio("ratio", ratio)
    names = {group.index: group.name for group in groups}
    for index, value in ratios.items():
        check_ratio(f"ratio of group {names.get(index, index)!r}", value)


def check_ratio(what: str, value: Any) -> None:
    """Raise :class:`InputError` unless ``value`` is a number in [0, 1); ``what`` names it. NaN and bool are no numbers here."""
    if not is_number(value) or not 0 <= value < 1:
        raise InputError(f"{what} must be in [0, 1), the fraction to remove; got {shown(value)}")


def check_request(scope: str, target: str, cost: Cost | None, max_ratio: float, round_to: int) -> None:
    """Raise :class:`InputError` for unknown names, constraints out of range, and a cost target without a cost."""
    if not is_choice(scope, SCOPES):
        raise InputError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    if not is_choice(target, TARGETS):
        raise InputError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    if target != "channels" and cost is None:
        raise InputError(f"target {target!r} needs a cost function of the removed units")
    if not is_number(max_ratio) or not 0 < max_ratio <= 1:
        raise InputError(f"max_ratio must be in (0, 1], the largest fraction of a group to remove; got {shown(max_ratio)}")
    if not is_whole(round_to) or round_to < 1:
        raise InputError(f"round_to must be an integer of at least 1; got {shown(round_to)}")


def check_groups(groups: Sequence[Group], scores: Sequence[object], total: int) -> None:
    """Raise :class:`InputError` unless there is one score array a group, and every unit is one of ``total``."""
    if len(scores) != len(groups):
        raise InputError(f"one score array a group is needed; got {len(scores)} for {len(groups)} groups")
    largest = max((int(group.units.max()) for group in groups if group.size), default=-1)
    if largest >= total:
        raise InputError(f"unit {largest} is out of range: the graph has {total} units")


def check_pieces(pieces: Sequence[np.ndarray], total: int) -> None:
    """Raise :class:`InputError` unless every piece is an array of unit ids in ``range(total)``."""
    for k, piece in enumerate(pieces):
        if not isinstance(piece, np.ndarray) or piece.ndim != 1 or (len(piece) and piece.dtype.kind not in "iu"):
            raise InputError(f"pieces[{k}] must be a one-dimensional array of unit ids; got {shown(piece)}")
        if len(piece) and not 0 <= int(piece.min()) <= int(piece.max()) < total:
            raise InputError(f"pieces[{k}] names units from {piece.min()} to {piece.max()}; the graph has {total} units")


def check_room(names: Sequence[str], sizes: np.ndarray, max_ratio: float, round_to: int) -> None:
    """Raise :class:`InputError` where ``round_to`` or ``max_ratio`` lets no group lose a unit. ``sizes``: int64 [groups].

    Groups of one unit do not count: they lose nothing under any constraint.
    """
    if not len(sizes) or sizes.max() < 2 or GroupLimits.of(sizes, max_ratio=max_ratio, round_to=round_to).allowed(sizes).any():
        return
    largest = int(sizes.argmax())
    what = f"the largest group, {names[largest]!r}, has {sizes[largest]} units"
    if sizes[largest] <= round_to:
        raise InputError(
            f"round_to={round_to} lets no group lose a unit: a group keeps a multiple of it, and {what}; "
            f"give a `round_to` below {sizes[largest]}"
        )
    if not GroupLimits.of(sizes, max_ratio=max_ratio).allowed(sizes).any():
        raise InputError(
            f"max_ratio={max_ratio:g} lets no group lose a unit: {what}, of which it allows none to be removed; "
            f"give a `max_ratio` of at least {math.ceil(10**4 / sizes[largest]) / 10**4:g}"
        )
    raise InputError(
        f"max_ratio={max_ratio:g} and round_to={round_to} together let no group lose a unit: {what}; "
        "raise `max_ratio` or lower `round_to`"
    )
