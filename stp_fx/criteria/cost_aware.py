"""Importance against cost: of two units of the same importance, the one that costs more is removed first.

Report, section 1.3.4. With b the base criterion's score and r = cost / cost_max, it prints

    additive        alpha * b + (1 - alpha) * r^beta
    multiplicative  b * r^beta

Both grow with the cost, and low scores are removed first: as printed, *cheap* units are removed. The section's aim is the
reverse, so the default scores a costly unit lower:

    additive        alpha * b + (1 - alpha) * (1 - r^beta)
    multiplicative  b / r^beta

``form="printed"`` gives the formulas as they stand in the report.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from stp_fx.analysis.build import analyze
from stp_fx.analysis.groups import Group
from stp_fx.checks import is_number, shown
from stp_fx.criteria.auto import Auto
from stp_fx.criteria.base import Criterion, ScoreContext, needs_of, register, resolve
from stp_fx.criteria.costs import PER, CostModel, Macs
from stp_fx.criteria.reduce import NORMALIZERS, REDUCTIONS, check_choice, normalize_scores
from stp_fx.errors import CriterionError, InputError

__all__ = ["CostAware"]

MODES = ("additive", "multiplicative")
FORMS = ("costly_first", "printed")


@register("mac_aware")
@dataclasses.dataclass(frozen=True)
class CostAware:
    """Any criterion's scores, weighed against the cost of a unit.

    ``base`` is a name or a criterion. ``reduction`` replaces the base's own unless it is None; ``normalizer`` is applied to
    the base's scores before the cost comes in ("max" puts them in [0, 1], as the cost is). ``alpha`` in [0, 1] is the
    weight of importance in the additive mode, ``beta`` >= 0 the exponent of the cost. ``cost`` is one of
    :mod:`stp_fx.criteria.costs` or any function like them, ``per`` "unit" or "layer" as in :class:`CostModel`; cost_max is
    taken over all groups that are scored.

    The multiplicative mode needs scores that are not negative, so not the normaliser "gaussian". There a unit that costs
    nothing is taken to cost as little as the cheapest that costs something.

    Raises :class:`InputError` for arguments out of range.
    """

    base: str | Criterion = "magnitude"
    alpha: float = 0.5
    beta: float = 1.0
    mode: str = "additive"
    form: str = "costly_first"
    cost: CostModel = dataclasses.field(default_factory=Macs)
    per: str = "unit"
    reduction: str | None = None
    normalizer: str = "max"

    def __post_init__(self) -> None:
        for what, known in (("mode", MODES), ("form", FORMS), ("per", PER), ("normalizer", NORMALIZERS)):
            check_choice(what, getattr(self, what), known)
        _check_number("alpha", self.alpha, 1.0)
        _check_number("beta", self.beta, math.inf)
        if isinstance(resolve(self.base), Auto):
            raise InputError("'auto' chooses by what a base criterion is not told; name the base ('magnitude', 'variance')")
        if self.reduction is not None:
            check_choice("reduction", self.reduction, REDUCTIONS)
            if not hasattr(resolve(self.base), "reduction"):
                raise InputError(f"{self.base!r} has no `reduction` to be replaced; leave it out")
        if self.mode == "multiplicative" and self.normalizer == "gaussian":
            raise InputError("the multiplicative mode needs scores that are not negative; 'gaussian' gives negative ones")
        if not callable(self.cost):
            raise InputError(f"`cost` is {shown(self.cost)}; give a cost model such as Macs(), Params() or Table({{...}})")

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that the base criterion reads beside weights."""
        return needs_of(self.criterion)

    @property
    def criterion(self) -> Criterion:
        """The base with its reduction replaced."""
        base = resolve(self.base)
        if self.reduction is None or not dataclasses.is_dataclass(base) or isinstance(base, type):
            return base
        return dataclasses.replace(base, reduction=self.reduction)  # type: ignore[call-arg]

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        scores = self.criterion(group, context).detach().cpu().double().numpy()
        scores = normalize_scores(scores, self.normalizer)
        # The entry holds the criterion, so that its id is nobody else's.
        _, ratios = context.cached(("cost_ratios", id(self)), lambda: (self, self._ratios(context)))
        ratio = ratios[group.index]
        if self.mode == "additive":
            term = ratio**self.beta if self.form == "printed" else 1.0 - ratio**self.beta
            return torch.from_numpy(self.alpha * scores + (1.0 - self.alpha) * term)
        if (scores < 0).any():
            raise CriterionError(
                f"the multiplicative mode was given negative scores of group {group.name!r} by {self.criterion!r}; "
                "use mode='additive', or a base or normalizer whose scores are not negative"
            )
        return torch.from_numpy(scores * ratio**self.beta if self.form == "printed" else scores / ratio**self.beta)

    def _ratios(self, context: ScoreContext) -> np.ndarray:
        """cost / cost_max by group index; at most 1 for the groups that are scored."""
        groups = context.groups or analyze(context.graph_module()).groups
        costs = np.asarray(self.cost(context, self.per), dtype=np.float64)
        mine = np.array([group.index for group in groups])
        if costs.ndim != 1 or len(costs) <= mine.max() or not np.isfinite(costs[mine]).all() or costs[mine].min() < 0:
            raise CriterionError(f"{self.cost!r} must give a finite cost of at least 0 for every group, by group index")
        largest = costs[mine].max()
        if largest == 0:
            raise CriterionError(f"no unit costs anything by {self.cost!r}, so costs cannot be weighed; use another cost")
        if self.mode == "multiplicative":
            costs = np.maximum(costs, costs[mine][costs[mine] > 0].min())
        return costs / largest


def _check_number(what: str, value: object, largest: float) -> None:
    if not is_number(value) or not 0 <= value <= largest or math.isinf(value):
        limits = "in [0, 1]" if largest == 1.0 else "of at least 0"
        raise InputError(f"{what} is a finite number {limits}; got {shown(value)}")
