"""How many units to remove: by count, or as few as bring a cost down to its target, under the constraints on every group.

Plans are prefixes of one sequence of units (:mod:`stp_fx.selection.search`). Longer prefixes never remove less, so targets are
met by bisection over the length.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from stp_fx.analysis.groups import Group
from stp_fx.errors import TargetError
from stp_fx.selection.allocation import allocate, choices_of, curve_of
from stp_fx.selection.arguments import Cost, check_groups, check_pieces, check_ratios, check_request
from stp_fx.selection.result import Selected, Shortfall, group_notes, group_shortfalls, whole_note
from stp_fx.selection.search import COUNT_SLACK, Search, Task, first_length, search_plans
from stp_fx.selection.selection import DamageFunction
from stp_fx.selection.uniform import select_uniformly

__all__ = ["select_units"]

_log = logging.getLogger(__name__)


def select_units(
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
    pieces: Sequence[np.ndarray] = (),
    uniform: bool = False,
    damages: Sequence[np.ndarray | DamageFunction] | None = None,
) -> Selected:
    """Choose the units to remove, with notes where the constraints keep the plan from what was asked.

    ``scores``: one array of shape [units] a group; the lowest are removed. ``total``: units of the graph. ``target``
    "channels" takes ``floor(ratio * n)`` units of every group (scope "local"; ``ratio`` of a product, for its factors), of
    all together ("global"), or of every class of groups ("isomorphic", with ``classes``: one number a group). "macs",
    "params", "latency" take the shortest prefix of the order whose ``cost`` is at most ``1 - ratio`` of the whole.
    ``ratios`` (by ``Group.index``) fixes groups, and the others meet the target. ``exponents`` is what :func:`carriers`
    gave: other groups are left whole; None prunes all, with exponent 1. ``whole`` (by ``Group.index``): the units that a
    group had before earlier removals; a group's own ratio is a fraction of those.

    A group keeps one unit, loses at most ``floor(max_ratio * n)``, and keeps a multiple of ``round_to`` units (rounded up; all
    of them if that is more than it has). Of each of the ``pieces`` (arrays of unit ids) one unit is kept. ``uniform``: the groups
    without a ratio of their own lose the same fraction. ``damages``: one curve (float64 [units + 1]) or function a group; of
    the plans that meet the target, the one of least damage is then taken.

    Raises :class:`InputError` for arguments out of range, and constraints that let no group lose a unit where a removal is
    asked for; :class:`TargetError` for a cost out of reach, with the cost in reach and the constraints that hold it.
    """
    check_ratios(groups, ratio, ratios or {})
    check_request(scope, target, cost, max_ratio, round_to)
    check_groups(groups, scores, total)
    check_pieces(pieces, total)
    task = Task.of(groups, total, ratio, ratios or {}, exponents, whole, max_ratio, round_to)
    by_group = target == "channels" and scope == "local" and damages is None
    search = search_plans(task, scores, pieces, scope=scope, classes=classes, by_group=by_group)
    if damages is not None:
        return _least_damage(search, target, cost, [damages[k] for k in task.carried])
    if uniform:
        return select_uniformly(search, target, cost)
    if target == "channels":
        return _channels(search, scope)
    assert cost is not None
    return _cheapest(search, target, cost)


def _channels(search: Search, scope: str) -> Selected:
    """The plan for a number of units: of each group, of each class of groups, or of all free groups together."""
    task, limits, order = search.task, search.limits, search.order
    if scope == "global":
        return _global_channels(search)
    if scope == "local":
        wanted = task.wanted
    else:
        taken = order.owner[(order.key <= task.ratio + COUNT_SLACK) & task.free[order.owner]]
        wanted = task.fixed + np.bincount(taken, minlength=len(order.sizes))
    counts = limits.allowed(wanted)
    asked, achieved = int(wanted.sum()), int(counts.sum())
    why = tuple(name for name, groups in limits.reasons(wanted).items() if groups[wanted > counts].any())
    whole = Shortfall(None, asked, achieved, int(limits.sizes.sum()), why) if achieved < asked else None
    return _selected(search, counts, wanted, whole, "channels")


def _global_channels(search: Search) -> Selected:
    """The plan of the longest prefix that removes at most ``ratio`` of the units of the free groups."""
    free, length = search.task.free, len(search.candidates)
    pooled = int(search.limits.sizes[free].sum())
    wanted = int(np.floor(search.task.ratio * pooled + COUNT_SLACK))
    too_many = first_length(length + 1, lambda n: n > length or int(search.counts(n)[free].sum()) > wanted)
    counts = search.counts(too_many - 1)
    achieved = int(counts[free].sum())
    why = _binding(search) if too_many > length else ("round_to",)
    whole = Shortfall(None, wanted, achieved, pooled, why) if achieved < wanted else None
    return _selected(search, counts, search.task.fixed, whole, "units")


def _binding(search: Search) -> tuple[str, ...]:
    """The constraints that keep free groups from losing more units."""
    reasons = search.limits.reasons(search.limits.sizes)
    return tuple(name for name, groups in reasons.items() if groups[search.task.free].any())


def _cheapest(search: Search, target: str, cost: Cost) -> Selected:
    """The plan of the shortest prefix whose cost is at most ``1 - ratio`` of the whole."""
    budget = _Budget.of(search, target, cost)
    found = budget.shortest()
    counts = search.counts(found)
    before = search.counts(found - 1) if found else np.zeros_like(counts)
    spare = _gives_back_a_unit(counts, before, budget.meets)
    whole = budget.shortfall(counts, "round_to" if found else "ratios") if spare else None
    return _selected(search, counts, search.task.fixed, whole, target)


def _least_damage(search: Search, target: str, cost: Cost | None, damages: Sequence[np.ndarray | DamageFunction]) -> Selected:
    """The plan of least damage whose cost is at most ``1 - ratio`` of the whole; for "channels", that removes so many units."""
    task, limits = search.task, search.limits
    choices = choices_of(limits, task.fixed, task.free)
    curves = [
        curve_of(each, group, own) if callable(each) else each
        for each, group, own in zip(damages, task.groups, choices, strict=True)
    ]
    whole = None
    if target == "channels":
        pooled = int(limits.sizes[task.free].sum())
        wanted = int(np.floor(task.ratio * pooled + COUNT_SLACK))
        start = search.counts(len(search.candidates))
        most = min(wanted, int(start[task.free].sum()))
        counts = allocate(curves, choices, lambda k: -float(k[task.free].sum()), -float(most), start)
        if most < wanted:
            whole = Shortfall(None, wanted, int(counts[task.free].sum()), pooled, _binding(search))
    else:
        assert cost is not None
        budget = _Budget.of(search, target, cost)
        counts = search.counts(budget.shortest())
        counts = allocate(curves, choices, budget.cost_of, budget.limit, counts)
        if any(budget.meets(counts - (np.arange(len(counts)) == k)) for k in np.flatnonzero(task.free & (counts > 0))):
            whole = budget.shortfall(counts, "round_to")
        elif not counts[task.free].any() and _gives_back_a_unit(counts, np.zeros_like(counts), budget.meets):
            whole = budget.shortfall(counts, "ratios")
    damage = float(sum(curve[k] for curve, k in zip(curves, counts, strict=True)))
    selected = _selected(search, counts, task.fixed, whole, "units" if target == "channels" else target)
    return dataclasses.replace(selected, damage=damage)


@dataclasses.dataclass(frozen=True, eq=False)
class _Budget:
    """A cost target: ``limit`` is what may be left of ``baseline``."""

    search: Search
    target: str
    cost: Cost
    baseline: float
    limit: float

    @classmethod
    def of(cls, search: Search, target: str, cost: Cost) -> _Budget:
        baseline = float(cost(np.zeros(search.task.total, dtype=bool)))
        return cls(search, target, cost, baseline, (1.0 - search.task.ratio) * baseline * (1.0 + 1e-12))

    def cost_of(self, counts: np.ndarray) -> float:
        """The kept units when each group loses so many."""
        return float(self.cost(self.search.removed(counts)))

    def meets(self, counts: np.ndarray) -> bool:
        return self.cost_of(counts) <= self.limit

    def shortest(self) -> int:
        """The length of the shortest prefix that meets the target.

        Raises:
            TargetError: none does.
        """
        length = len(self.search.candidates)
        if not self.meets(self.search.counts(length)):
            smallest = self.cost_of(self.search.counts(length))
            raise TargetError(_out_of_reach(self.search, self.target, self.limit, self.baseline, smallest))
        return first_length(length, lambda n: self.meets(self.search.counts(n)))

    def shortfall(self, counts: np.ndarray, why: str) -> Shortfall | None:
        """That the plan goes beyond the target by more than a unit; None where nothing is asked for."""
        ratio = self.search.task.ratio
        if ratio <= 0 or self.baseline <= 0:
            return None
        return Shortfall(None, ratio, 1.0 - self.cost_of(counts) / self.baseline, 1.0, (why,))


def _gives_back_a_unit(counts: np.ndarray, before: np.ndarray, meets: Callable[[np.ndarray], bool]) -> bool:
    """Whether the step from ``before`` to ``counts``, if it is of several units, could do with one less."""
    step = counts - before
    return int(step.sum()) > 1 and meets(counts - (np.arange(len(step)) == step.argmax()))


def _out_of_reach(search: Search, target: str, limit: float, baseline: float, smallest: float) -> str:
    task = search.task
    most = search.limits.reasons(search.limits.sizes - 1)
    reasons = {name: int(groups[task.free].sum()) for name, groups in most.items()}
    reasons |= {"ratios": int((~task.free).sum()), "products": task.resting}
    held = [f"{search.limits.label(name)} ({count} group{'s' * (count > 1)})" for name, count in reasons.items() if count]
    held += [f"ignore ({task.left_out} of {task.total} units are outside the groups)"] if task.left_out else []
    reach = np.floor(1e4 * (1.0 - smallest / baseline)) / 1e4 if baseline else 0.0
    return (
        f"target {target!r} with ratio {task.ratio} asks for at most {limit:.6g} {target} of {baseline:.6g}, but the smallest in "
        f"reach is {smallest:.6g} (ratio {reach:.4g}); held back by: {', '.join(held) or 'every group keeps one unit'}; lower "
        "`ratio`" + (", or relax one of these" if held else "")
    )


def _selected(search: Search, counts: np.ndarray, wanted: np.ndarray, whole: Shortfall | None, what: str) -> Selected:
    """The plan with its shortfalls; ``wanted``: the units asked of each group (int64 [groups]), 0 where it is only a total."""
    task, limits = search.task, search.limits
    names = [group.name for group in task.groups]
    unable = task.free & (task.ratio > 0) & (limits.sizes > 1) & (limits.allowed(limits.sizes) == 0)
    if what == "channels":
        unable &= wanted > 0
    groups = group_shortfalls(names, limits, counts, wanted, unable, search.passed_over(counts))
    notes = group_notes(groups, limits, {group.name for group, free in zip(task.groups, task.free, strict=True) if not free})
    if whole is not None:
        first = whole_note(whole, what, task.ratio, limits)
        rounded_up = whole.constraints == ("round_to",) and what in ("channels", "units")
        _log.log(logging.INFO if rounded_up else logging.WARNING, "%s", first)
        groups, notes = (whole, *groups), (first, *notes)
    return Selected(search.removed(counts), groups, notes)
