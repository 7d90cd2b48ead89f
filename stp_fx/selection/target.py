"""How many units go: by count, or as few as bring a cost down to its target, under the constraints on every group.

A plan is one number a group (how many of its units go, lowest scores first), and that number comes from a prefix of one
sequence of units. Longer prefixes never remove less, so both targets are met by bisection over the prefix length.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from stp_fx.analysis.groups import Group
from stp_fx.errors import TargetError
from stp_fx.selection.arguments import Cost, check_groups, check_ratios, check_request
from stp_fx.selection.rounding import GroupLimits
from stp_fx.selection.scope import UnitOrder, local_fraction, order_units

__all__ = ["select"]

# ratio * n is a whole number for many ratios that binary fractions only come near to (0.29 * 100).
_COUNT_SLACK = 1e-9

_log = logging.getLogger(__name__)


def select(
    groups: Sequence[Group],
    scores: Sequence[torch.Tensor | np.ndarray],
    *,
    total: int,
    ratio: float,
    scope: str = "local",
    target: str = "channels",
    ratios: Mapping[int, float] | None = None,
    exponents: Mapping[int, int] | None = None,
    max_ratio: float = 1.0,
    round_to: int = 1,
    cost: Cost | None = None,
    classes: Sequence[int] | None = None,
    whole: Mapping[int, int] | None = None,
) -> np.ndarray:
    """Choose the units to remove: bool [total], indexed by the ids in ``Group.units``; True goes.

    ``target`` "channels", scope "local": each group loses ``floor(ratio * n)`` of its lowest (of each factor of a
    product shared by k factors: the fraction that takes ``ratio`` from the product). Scope "global": the
    ``floor(ratio * units)`` lowest of all. Scope "isomorphic": ``floor(ratio * n)`` of the lowest of each class of
    groups (``classes`` has one number a group). "macs", "params", "latency": the shortest prefix of the order for
    which ``cost`` is at most ``1 - ratio`` of what it is with nothing removed.

    ``ratios`` (by ``Group.index``) fixes groups: they lose that fraction of their units, whatever the scope and target,
    and the others meet the target. ``exponents`` is what :func:`carriers` gave: groups absent from it are left whole;
    None prunes all, with exponent 1.

    ``whole`` (by ``Group.index``): how many units a group had when nothing had been removed yet. Ratios of single groups are
    meant of that, and what went before counts.

    Constraints hold in the plan itself, and a target is met with them: a group keeps at least one unit, loses at most
    ``floor(max_ratio * n)``, and keeps a multiple of ``round_to`` units (rounded up; all of them if that is more than
    it has). Counts rounded up may leave a "channels" target undershot, and a cost below its target, by more than a
    unit; a log message says so.

    Raises :class:`InputError` for arguments out of range, :class:`TargetError` for a cost target out of reach, with the
    cost in reach.
    """
    ratios = {} if ratios is None else ratios
    check_ratios(groups, ratio, ratios)
    check_request(scope, target, cost, max_ratio, round_to)
    check_groups(groups, scores, total)
    carried = [k for k, group in enumerate(groups) if exponents is None or exponents.get(group.index, 0) > 0]
    groups, scores = [groups[k] for k in carried], [scores[k] for k in carried]
    sizes = np.array([group.size for group in groups], dtype=np.int64)
    limits = GroupLimits.of(sizes, max_ratio=max_ratio, round_to=round_to)
    compared = None if classes is None else [classes[k] for k in carried]
    order = order_units(groups, scores, scope=scope, exponents=exponents, classes=compared, largest=limits.largest)
    powers = np.array([1 if exponents is None else exponents[group.index] for group in groups], dtype=np.int64)
    own = np.array([ratios.get(group.index, -1.0) for group in groups])
    before = order.sizes if whole is None else np.array([max(whole.get(g.index, g.size), g.size) for g in groups])
    fixed = np.where(own >= 0, _local_counts(np.maximum(own, 0.0), powers, order.sizes, before), 0)
    search = _Search(order, limits, fixed, _candidates(order, limits, own < 0), total)

    if target == "channels" and scope == "local":
        wanted = np.where(own >= 0, fixed, _local_counts(np.full(len(groups), ratio), powers, order.sizes, before))
        counts = limits.allowed(wanted)
        _report_rounding("channels", int(np.minimum(wanted, limits.largest).sum()), int(counts.sum()), round_to)
    elif target == "channels" and scope == "isomorphic":
        length = int(np.searchsorted(order.key[search.candidates], ratio + _COUNT_SLACK, side="right"))
        wanted = fixed + np.bincount(order.owner[search.candidates[:length]], minlength=len(groups))
        counts = limits.allowed(wanted)
        _report_rounding("channels", int(wanted.sum()), int(counts.sum()), round_to)
    elif target == "channels":
        pooled = int(order.sizes[own < 0].sum())
        counts = _global_channels(search, int(np.floor(ratio * pooled + _COUNT_SLACK)), own < 0)
    else:
        assert cost is not None
        counts = _cheapest(search, target, ratio, cost)
    return search.removed(counts)


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
    """Plans as prefixes: counts of units to remove a group, for a prefix of ``candidates`` (positions in ``order``)."""

    order: UnitOrder
    limits: GroupLimits
    fixed: np.ndarray
    candidates: np.ndarray
    total: int

    def counts(self, length: int) -> np.ndarray:
        owners = self.order.owner[self.candidates[:length]]
        return self.limits.allowed(self.fixed + np.bincount(owners, minlength=len(self.order.sizes)))

    def removed(self, counts: np.ndarray) -> np.ndarray:
        flags = np.zeros(self.total, dtype=bool)
        flags[self.order.unit[self.order.rank < counts[self.order.owner]]] = True
        return flags


def _candidates(order: UnitOrder, limits: GroupLimits, free: np.ndarray) -> np.ndarray:
    """Positions that a prefix may take, in order: of groups without a ratio of their own, up to each group's limit."""
    sequence = order.sequence()
    owners = order.owner[sequence]
    return sequence[free[owners] & (order.rank[sequence] < limits.largest[owners])]


def _local_counts(ratio: np.ndarray, powers: np.ndarray, sizes: np.ndarray, before: np.ndarray) -> np.ndarray:
    gone = np.floor(local_fraction(ratio, powers) * before + _COUNT_SLACK).astype(np.int64)
    return np.maximum(gone - (before - sizes), 0)


def _first(length: int, holds: Callable[[int], bool]) -> int:
    """The smallest number in 0..length that ``holds``, given that ``length`` does, and all above one that does."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _global_channels(search: _Search, wanted: int, free: np.ndarray) -> np.ndarray:
    """Counts of the longest prefix that removes at most ``wanted`` units of the free groups."""
    length = len(search.candidates)
    too_many = _first(length + 1, lambda n: n > length or int(search.counts(n)[free].sum()) > wanted)
    counts = search.counts(too_many - 1)
    achieved = int(counts[free].sum())
    if too_many > length and achieved < wanted:
        _log.warning(
            "asked to remove %d units, but max_ratio, round_to and one unit a group to be kept allow only %d",
            wanted,
            achieved,
        )
    else:
        _report_rounding("channels", wanted, achieved, search.limits.round_to)
    return counts


def _cheapest(search: _Search, target: str, ratio: float, cost: Cost) -> np.ndarray:
    """Counts of the shortest prefix whose cost is at most ``1 - ratio`` of the whole."""
    baseline = float(cost(np.zeros(search.total, dtype=bool)))
    limit = (1.0 - ratio) * baseline * (1.0 + 1e-12)

    def meets(counts: np.ndarray) -> bool:
        return float(cost(search.removed(counts))) <= limit

    length = len(search.candidates)
    if not meets(search.counts(length)):
        smallest = float(cost(search.removed(search.counts(length))))
        raise TargetError(
            f"target {target!r} with ratio {ratio} asks for at most {limit:.6g} {target} of {baseline:.6g}, but the "
            f"smallest in reach is {smallest:.6g}: lower `ratio`, raise `max_ratio`, lower `round_to`, or take names "
            "out of `ignore` and `ratios`"
        )
    found = _first(length, lambda n: meets(search.counts(n)))
    counts = search.counts(found)
    if found and _gives_back_a_unit(counts, search.counts(found - 1), meets):
        _log.warning(
            "round_to=%d: asked to remove %.4f of the %s, the plan removes %.4f, beyond by more than one unit",
            search.limits.round_to,
            ratio,
            target,
            1.0 - float(cost(search.removed(counts))) / baseline,
        )
    return counts


def _gives_back_a_unit(counts: np.ndarray, before: np.ndarray, meets: Callable[[np.ndarray], bool]) -> bool:
    """Whether the step from ``before`` to ``counts``, which rounding made of several units, could do with one less."""
    step = counts - before
    return int(step.sum()) > 1 and meets(counts - (np.arange(len(step)) == step.argmax()))


def _report_rounding(what: str, wanted: int, achieved: int, round_to: int) -> None:
    if round_to > 1 and wanted - achieved > 1:
        _log.info("round_to=%d: asked to remove %d %s, the plan removes %d", round_to, wanted, what, achieved)
