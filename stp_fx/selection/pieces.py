"""Pieces: of some sets of units at least one must be kept, because a tensor would lose all its positions otherwise.

A ``split`` or a slice makes tensors of some of a group's units, or of some units of several groups. The unit of a piece that
would be removed last is *held* where all others of the piece are removed.

Which units are held follows from one walk along the order of removal, up to the counts at hand: a unit is removed unless its
group has lost as many as it may, or unless the unit is the last one kept of a piece; then it is held, and the next unit of its
group is removed in its place. :func:`held_units` computes the outcome of the walk piece by piece, in the order of the pieces'
last units: a piece whose last unit stands at position p can only lose that unit once all holds before p are decided.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stp_fx.arrays import sorted_set
from stp_fx.selection.scope import UnitOrder

__all__ = ["held_units"]


def held_units(order: UnitOrder, largest: np.ndarray, pieces: Sequence[np.ndarray], late: np.ndarray) -> np.ndarray:
    """The units to keep so that every piece keeps one, when each group loses up to ``largest`` units: bool [units].

    The result follows the positions of ``order``. ``largest`` is int64 [groups], ``pieces`` are arrays of unit ids. The groups
    flagged in ``late`` (bool [groups]) come last in the walk: they hold the unit of a piece that they share with others.

    Whatever counts up to ``largest`` are removed of each group, lowest ranks first among the units that are not held: every
    piece keeps a unit. A piece is only left without a held unit if it has a unit outside of the groups, or one that comes
    after the ``largest`` units that its group may lose, held ones not counted.
    """
    held = np.zeros(len(order.unit), dtype=bool)
    at_risk = _at_risk(order, largest, pieces)
    if not at_risk:
        return held
    position = np.empty(len(order.unit), dtype=np.int64)
    position[order.sequence(late)] = np.arange(len(order.unit))
    before = order.rank.copy()  # how many units of its group are removed before each unit
    starts = np.cumsum(order.sizes) - order.sizes
    for piece in sorted(at_risk, key=lambda units: int(position[units].max())):
        if held[piece].any() or (before[piece] >= largest[order.owner[piece]]).any():
            continue
        last = piece[position[piece].argmax()]
        held[last] = True
        group = slice(starts[order.owner[last]], starts[order.owner[last]] + order.sizes[order.owner[last]])
        before[group] -= order.rank[group] > order.rank[last]
    return held


def _at_risk(order: UnitOrder, largest: np.ndarray, pieces: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The pieces that could lose all their units, as sorted positions in ``order``; equal ones once.

    A piece with a unit outside of the groups, or with more units of a group than the group may lose, always keeps one.
    """
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces or not len(order.unit):
        return []
    ids = np.concatenate(pieces).astype(np.int64)
    place = np.full(max(int(ids.max()), int(order.unit.max())) + 1, -1, dtype=np.int64)
    place[order.unit] = np.arange(len(order.unit))
    flat, piece = place[ids], np.repeat(np.arange(len(pieces)), [len(each) for each in pieces])
    safe = np.zeros(len(pieces), dtype=bool)
    safe[piece[flat < 0]] = True
    inside = ~safe[piece]
    piece, flat = np.divmod(sorted_set(piece[inside] * len(order.unit) + flat[inside]), len(order.unit))
    shares, counts = np.unique(piece * len(order.sizes) + order.owner[flat], return_counts=True)
    safe[shares[counts > largest[shares % len(order.sizes)]] // len(order.sizes)] = True
    left = ~safe[piece]
    piece, flat = piece[left], flat[left]
    parts = np.split(flat, np.flatnonzero(np.diff(piece)) + 1) if len(flat) else []
    return list({part.tobytes(): part for part in parts}.values())
