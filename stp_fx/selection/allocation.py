"""How much of each group is removed when damages are known: a multiple-choice knapsack against an exact cost.

Every group has a damage for every number of its units that may go. The plan of the least total damage under a budget is a
multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack problems", 2004, chapter 11): of each group one level is
chosen. Costs are not sums over groups: a layer's MACs shrink with what leaves before it and what leaves after it. So the knapsack
is solved in rounds. In each, costs are exact for a change of one group at the present plan, and groups move within a window
around it; the answer is finished with the exact cost. The window is halved when that gives no less damage. The levels of a group
are spread over its window, so the last rounds choose single units. At the end, pairs of groups exchange single steps.

A round is solved by dynamic programming over the cost that is saved. (scipy's ``milp`` gave equally good plans, took 17 times as
long on 200 small problems, and HiGHS prints to the standard output.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from stp_fx.analysis.groups import Group
from stp_fx.checks import is_number, shown
from stp_fx.errors import InputError, translated
from stp_fx.selection.rounding import GroupLimits
from stp_fx.selection.selection import DamageFunction

__all__ = ["allocate", "choices_of", "curve_of"]

_ASKED = 16
"""Fractions that a user's function is asked for; a measurement each, often enough."""

_LEVELS = 17
"""Levels of a group in one round."""
_STEPS = 4000
"""Of the largest saving: how finely the dynamic programme counts. The exact cost has the last word."""
_PROBES = 5
"""Levels at which the cost of a change of one group is evaluated; between them it is nearly linear."""
_ROUNDS = 40
_EXCHANGES = 64
"""Pairs of groups that are tried for an exchange, most gain first; each costs one evaluation."""
_BETTER = 1e-6
"""The fraction of the damage by which a round must be better to count."""

Cost = Callable[[np.ndarray], float]
"""The cost when each group loses so many units (int64 [groups])."""


def choices_of(limits: GroupLimits, fixed: np.ndarray, free: np.ndarray) -> list[np.ndarray]:
    """The numbers of units that each group may lose, rising: of a ``free`` group all that the limits allow, from 0; of another
    one only its ``fixed`` number (int64 [groups])."""
    held = limits.allowed(fixed)
    steps = np.stack([limits.allowed(np.full_like(limits.sizes, k)) for k in range(int(limits.sizes.max(initial=0)) + 1)])
    return [np.unique(steps[:, k]) if free[k] else held[k : k + 1] for k in range(len(limits.sizes))]


def curve_of(function: DamageFunction, group: Group, choices: np.ndarray) -> np.ndarray:
    """The damage of a group at every number of its units (float64 [units + 1]), as the user's function gives it.

    It is asked for at most 16 fractions, rising from above 0; in between the damage is interpolated.

    Raises:
        InputError: the function fails, or does not give a finite number of at least 0 for every fraction.
    """
    asked = choices[choices > 0]
    if len(asked) > _ASKED:
        asked = np.unique(asked[np.linspace(0, len(asked) - 1, _ASKED).round().astype(np.int64)])
    if not len(asked):
        return np.zeros(group.size + 1)
    fractions = tuple(float(k) / group.size for k in asked)

    def failed(said: str) -> str:
        return f"`allocation`, {shown(function)}, fails on group {group.name!r} with {said}; it is called (group, fractions)"

    with translated(InputError, failed):
        given = function(group.name, fractions)
        found = list(np.asarray(given, dtype=object).reshape(-1))
    if len(found) != len(fractions) or not all(is_number(each) and 0 <= each < math.inf for each in found):
        raise InputError(
            f"`allocation`, {shown(function)}, must give one finite damage of at least 0 for each of {len(fractions)} fractions "
            f"of group {group.name!r}; it gave {shown(given)}"
        )
    return np.interp(np.arange(group.size + 1), [0, *asked], [0.0, *map(float, found)])


def allocate(
    curves: Sequence[np.ndarray], choices: Sequence[np.ndarray], cost: Cost, budget: float, start: np.ndarray
) -> np.ndarray:
    """The units that each group loses (int64 [groups]): of the plans found with ``cost`` up to ``budget``, that of least damage.

    ``curves``: float64 [units + 1] a group, its damage at every number of units. ``choices``: the numbers that it may lose,
    rising. ``start`` is one of each, and meets the budget.
    """
    knapsack = _Knapsack(curves, choices, _remembered(cost), budget)
    least = np.array([each[0] for each in choices])
    begun = knapsack.solved(least, 1.0)
    return min((knapsack.improved(knapsack.finished(each)) for each in (start, begun)), key=knapsack.damage)


@dataclasses.dataclass(frozen=True, eq=False)
class _Knapsack:
    """The arguments of :func:`allocate`."""

    curves: Sequence[np.ndarray]
    choices: Sequence[np.ndarray]
    cost: Cost
    budget: float

    @property
    def widest(self) -> int:
        return max((int(each[-1] - each[0]) for each in self.choices), default=0)

    def damage(self, counts: np.ndarray) -> float:
        return float(sum(curve[k] for curve, k in zip(self.curves, counts, strict=True)))

    def improved(self, best: np.ndarray) -> np.ndarray:
        """The best plan that rounds from this one lead to."""
        window = 1.0
        for _ in range(_ROUNDS):
            found = self.finished(self.solved(best, window))
            if self.damage(found) < self.damage(best) * (1.0 - _BETTER):
                best = found
            elif window * self.widest < 1:
                break
            else:
                window /= 2
        return self.exchanged(best)

    def exchanged(self, counts: np.ndarray) -> np.ndarray:
        """``counts`` after steps that one group takes for another, as long as that gives less damage within the budget.

        A round changes groups as if they saved independently of each other. Where few units are left that is not so."""
        while True:
            least = _BETTER * self.damage(counts)
            pairs = [
                (gain - damage, (k, after), (j, back))
                for k, after, damage in self._steps(counts, +1)
                for j, back, gain in self._steps(counts, -1)
                if j != k and gain - damage > least
            ]
            for _, taken, returned in sorted(pairs, reverse=True)[:_EXCHANGES]:
                found = _with(_with(counts, *taken), *returned)
                if self.cost(found) <= self.budget:
                    counts = self.finished(found)
                    break
            else:
                return counts

    def solved(self, present: np.ndarray, window: float) -> np.ndarray:
        """The answer of one round: the least damage, if the groups' changes saved independently of each other."""
        levels = [_levels(each, int(k), window) for each, k in zip(self.choices, present, strict=True)]
        costs = [self._column(present, k, each) for k, each in enumerate(levels)]
        saved = [column[0] - column for column in costs]
        wanted = self.cost(present) - self.budget + sum(float(column[0]) - self.cost(present) for column in costs)
        damages = [curve[each] for curve, each in zip(self.curves, levels, strict=True)]
        chosen = _least_damage(damages, saved, wanted)
        return np.array([each[k] for each, k in zip(levels, chosen, strict=True)], dtype=np.int64)

    def _column(self, present: np.ndarray, group: int, levels: np.ndarray) -> np.ndarray:
        """The cost at each level of one group while the others are at present; float64 [levels]."""
        probes = np.unique(np.linspace(0, len(levels) - 1, _PROBES).round().astype(np.int64))
        found = [self.cost(_with(present, group, int(levels[k]))) for k in probes]
        return np.interp(levels, levels[probes], found)

    def finished(self, counts: np.ndarray) -> np.ndarray:
        """``counts`` with the budget met, and no step left that a group could take back within it.

        Steps are taken where they do least damage for what they save, and taken back where they did most.
        """
        counts = self._within(counts)
        while True:
            steps = [(gain, k, back) for k, back, gain in self._steps(counts, -1)]
            for _, k, back in sorted(steps, key=lambda step: -step[0]):
                found = _with(counts, k, back)
                if self.cost(found) <= self.budget:
                    counts = found
                    break
            else:
                return counts

    def _within(self, counts: np.ndarray) -> np.ndarray:
        while self.cost(counts) > self.budget:
            now, best = self.cost(counts), None
            for k, after, damage in self._steps(counts, +1):
                saved = now - self.cost(_with(counts, k, after))
                rate = damage / saved if saved > 0 else np.inf
                if best is None or rate < best[0]:
                    best = (rate, k, after)
            if best is None:  # everything removable is removed; `start` met the budget, so the cost does not fall with counts
                return counts
            counts = _with(counts, best[1], best[2])
        return counts

    def _steps(self, counts: np.ndarray, by: int) -> list[tuple[int, int, float]]:
        """For each group that can take it: its number, its count one step on or back, and the difference in damage."""
        found = []
        for k, (curve, choices) in enumerate(zip(self.curves, self.choices, strict=True)):
            at = int(np.searchsorted(choices, counts[k])) + by
            if 0 <= at < len(choices):
                to = int(choices[at])
                found.append((k, to, abs(float(curve[to] - curve[counts[k]]))))
        return found


def _least_damage(damages: Sequence[np.ndarray], saved: Sequence[np.ndarray], wanted: float) -> list[int]:
    """One level of each group, of least total damage, that together save ``wanted``, up to rounding to ``_STEPS`` steps; the
    largest savings where nothing saves so much.

    ``best[s]`` is the least damage of the groups so far that saves at least s steps: s - k, for a level that saves k of them.
    """
    whole = sum(float(each.max()) for each in saved)
    step = whole / _STEPS if whole > 0 else 1.0
    goal = min(max(int(np.ceil(wanted / step - 0.5)), 0), sum(int(np.rint(each.max() / step)) for each in saved))
    best = np.full(goal + 1, np.inf)
    best[0] = 0.0
    picks = []
    for damage, saving in zip(damages, saved, strict=True):
        found, pick = np.full(goal + 1, np.inf), np.zeros(goal + 1, dtype=np.int64)
        for level, steps in enumerate(np.rint(saving / step).astype(np.int64)):
            before = best[np.maximum(np.arange(goal + 1) - steps, 0)] + damage[level]
            better = before < found
            found[better], pick[better] = before[better], level
        best = found
        picks.append((pick, np.rint(saving / step).astype(np.int64)))
    chosen, left = [], goal
    for pick, steps in reversed(picks):
        chosen.append(int(pick[left]))
        left = max(left - int(steps[chosen[-1]]), 0)
    return chosen[::-1]


def _with(counts: np.ndarray, group: int, value: int) -> np.ndarray:
    changed = counts.copy()
    changed[group] = value
    return changed


def _levels(choices: np.ndarray, present: int, window: float) -> np.ndarray:
    """At most ``_LEVELS`` of the choices, spread over the window around the present one, which is among them."""
    reach = max(window * float(choices[-1]), 1.0)
    near = choices[(choices >= present - reach) & (choices <= present + reach)]
    if len(near) > _LEVELS:
        near = near[np.linspace(0, len(near) - 1, _LEVELS).round().astype(np.int64)]
    return np.union1d(near, [present])


def _remembered(cost: Cost) -> Cost:
    known: dict[bytes, float] = {}

    def remembering(counts: np.ndarray) -> float:
        key = counts.tobytes()
        if key not in known:
            known[key] = float(cost(counts))
        return known[key]

    return remembering
