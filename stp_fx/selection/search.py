"""Plans as prefixes of one sequence of units, under the constraints on every group.

A plan is one count a group: the units of the lowest ranks are removed, and ranks put held units last. Every constraint is in
the order or in the counts, so none is repaired afterwards. The count of a group comes from a prefix of one sequence of units:
how many of the group's units the prefix has (plus the fixed count of a group with a ratio of its own), rounded down to an
allowed count (:meth:`~stp_fx.selection.rounding.GroupLimits.allowed`).

**Longer prefixes never remove less.** Let m <= n be lengths of prefixes. (1) No group has more units in the prefix m than in
the prefix n. (2) ``allowed`` rises with its argument: it takes a minimum, and rounds a kept count up to a multiple or to the
size. So the counts of m are at most those of n in every group. (3) Ranks do not depend on the length: the units to hold are
decided once (:func:`~stp_fx.selection.pieces.held_units`). So the units removed for m are among those removed for n, and a
cost that falls with every removed unit falls along the lengths. Bisection over the length therefore finds the shortest prefix
that meets a cost, and the longest that does not exceed a number of units.

**Every piece keeps a unit.** ``held_units`` gives that for all counts up to the largest, and prefixes only have such counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from stp_fx.analysis.groups import Group
from stp_fx.selection.arguments import check_room
from stp_fx.selection.pieces import held_units
from stp_fx.selection.rounding import GroupLimits
from stp_fx.selection.scope import UnitOrder, local_fraction, order_units

__all__ = ["COUNT_SLACK", "Search", "Task", "first_length", "search_plans"]

COUNT_SLACK = 1e-9
"""``ratio * n`` is a whole number for many ratios that binary fractions only come near to (0.29 * 100)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The groups that carry, with what is asked of each: arrays of shape [groups].

    ``carried``: their positions in the groups given. ``before``: the units of each before earlier removals. ``powers``: their
    exponents. ``own``: a group's own ratio, or -1. ``wanted``: the units of each that its ratio takes in the local scope, before
    constraints. ``left_out``: units outside of all groups given; ``resting``: groups that do not carry.
    """

    groups: list[Group]
    carried: list[int]
    total: int
    ratio: float
    before: np.ndarray
    powers: np.ndarray
    own: np.ndarray
    wanted: np.ndarray
    limits: GroupLimits
    left_out: int
    resting: int

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        total: int,
        ratio: float,
        ratios: Mapping[int, float],
        exponents: Mapping[int, int] | None,
        whole: Mapping[int, int] | None,
        max_ratio: float,
        round_to: int,
    ) -> Task:
        carried = [k for k, group in enumerate(groups) if exponents is None or exponents.get(group.index, 0) > 0]
        some = [groups[k] for k in carried]
        powers = np.array([1 if exponents is None else exponents[group.index] for group in some], dtype=np.int64)
        own = np.array([ratios.get(group.index, -1.0) for group in some], dtype=np.float64)
        sizes = np.array([group.size for group in some], dtype=np.int64)
        before = np.array([max((whole or {}).get(g.index, g.size), g.size) for g in some], dtype=np.int64)
        if ratio > 0 or (own > 0).any():
            check_room([group.name for group in some], before, max_ratio, round_to)
        wanted = _local_counts(np.where(own >= 0, own, ratio), powers, sizes, before)
        chosen = np.array([group.chosen for group in some], dtype=np.int64)
        limits = GroupLimits.of(sizes, max_ratio=max_ratio, round_to=round_to, chosen=chosen)
        outside = total - sum(group.size for group in groups)
        return cls(some, carried, total, ratio, before, powers, own, wanted, limits, outside, len(groups) - len(some))

    @property
    def free(self) -> np.ndarray:
        """The groups without a ratio of their own: bool [groups]."""
        return self.own < 0

    @property
    def fixed(self) -> np.ndarray:
        """The units that the groups with a ratio of their own lose, before constraints; 0 for the others: int64 [groups]."""
        return np.where(self.free, 0, self.wanted)


def _local_counts(ratio: np.ndarray, powers: np.ndarray, sizes: np.ndarray, before: np.ndarray) -> np.ndarray:
    counts = np.floor(local_fraction(ratio, powers) * before + COUNT_SLACK).astype(np.int64)
    return np.maximum(counts - (before - sizes), 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """Plans as prefixes: counts of units to remove a group, for a prefix of ``candidates`` (positions in ``order``).

    ``held`` (bool [units], positions in ``order``) and ``rank`` (as ranks would be without holding) tell which units are kept
    for a piece.
    """

    task: Task
    order: UnitOrder
    limits: GroupLimits
    candidates: np.ndarray
    held: np.ndarray
    rank: np.ndarray

    def counts(self, length: int) -> np.ndarray:
        """The units of each group that the prefix of this length removes: int64 [groups]."""
        owners = self.order.owner[self.candidates[:length]]
        return self.limits.allowed(self.task.fixed + np.bincount(owners, minlength=len(self.order.sizes)))

    def removed(self, counts: np.ndarray) -> np.ndarray:
        """The units removed when each group loses ``counts``: bool [units of the graph]."""
        flags = np.zeros(self.task.total, dtype=bool)
        flags[self.order.unit[self.order.rank < counts[self.order.owner]]] = True
        return flags

    def passed_over(self, counts: np.ndarray) -> dict[int, list[int]]:
        """By group: the positions in it of held units that rank below a unit that is removed."""
        if not self.held.any():
            return {}
        taken = self.order.rank < counts[self.order.owner]
        top = np.full(len(self.order.sizes), -1, dtype=np.int64)
        np.maximum.at(top, self.order.owner[taken], self.rank[taken])
        starts = np.cumsum(self.order.sizes) - self.order.sizes
        found: dict[int, list[int]] = {}
        for place in np.flatnonzero(self.held & (self.rank < top[self.order.owner])).tolist():
            owner = int(self.order.owner[place])
            found.setdefault(owner, []).append(place - int(starts[owner]))
        return found


def search_plans(
    task: Task,
    scores: Sequence[torch.Tensor | np.ndarray],
    pieces: Sequence[np.ndarray],
    *,
    scope: str,
    classes: Sequence[int] | None,
    by_group: bool,
) -> Search:
    """The plans for a task; ``scores`` and ``classes`` are of the groups given, of which the task has those that carry.

    ``by_group``: the ratios give every group's count, so that units are only held for these counts.
    """
    chosen = [scores[k] for k in task.carried]
    compared = None if classes is None else [classes[k] for k in task.carried]
    exponents = {group.index: int(power) for group, power in zip(task.groups, task.powers, strict=True)}
    ordered = functools.partial(order_units, task.groups, chosen, scope=scope, exponents=exponents, classes=compared)
    limits = task.limits
    order = ordered(largest=limits.largest)
    rank = order.rank
    at_hand = task.wanted if by_group else np.where(task.free, limits.sizes, task.fixed)
    held = held_units(order, limits.allowed(at_hand), pieces, late=task.free)
    if held.any():
        limits = limits.holding(np.bincount(order.owner[held], minlength=len(order.sizes)))
        order = ordered(largest=limits.largest, held=held)
    sequence = order.sequence()
    owners = order.owner[sequence]
    candidates = sequence[task.free[owners] & (order.rank[sequence] < limits.largest[owners])]
    return Search(task, order, limits, candidates, held, rank)


def first_length(length: int, holds: Callable[[int], bool]) -> int:
    """The smallest number in 0..length that ``holds``, given that ``length`` does, and all above one that does."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
