"""Optimal Brain Damage: the rise of the loss, at a minimum, when a unit's weights become zero, by the Hessian's diagonal.

LeCun, Denker and Solla, "Optimal brain damage", NeurIPS 1990, equation 5, summed over the weights of a unit. The diagonal
is that of the empirical Fisher matrix (mean squared gradients of single samples), or Hutchinson's estimate of the
Hessian's own ("A stochastic estimator of the trace of the influence matrix", 1990).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from stp_fx.analysis.groups import Axis, Group
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.reduce import check_choice, check_combining, combine, local_sums
from stp_fx.criteria.sums import sums_along
from stp_fx.criteria.taylor import collected, members_with_gradients

__all__ = ["Hessian"]

METHODS = {"fisher": "fisher", "hutchinson": "hessian"}
"""By method, the name of the need."""


@register("hessian")
@dataclasses.dataclass(frozen=True)
class Hessian:
    """Half the sum of w^2 * h over a unit's weights, on every axis of the group, reduced over the axes.

    ``method`` "fisher" or "hutchinson" is the source of h. Fisher's h is never negative. Hutchinson's may be: the
    estimate is noisy, and away from a minimum the curvature itself can be negative. Such values count as they are
    within the sum, where noise of either sign cancels; a unit whose sum is negative on an axis scores 0 there, since the
    quadratic model has no rise of the loss to offer. So scores are never negative. Frozen parameters are left out,
    as in :class:`~stp_fx.criteria.Taylor`.
    """

    method: str = "fisher"
    reduction: str = "mean"
    normalizer: str = "none"

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        check_combining(self.reduction, self.normalizer)

    @property
    def needs(self) -> tuple[str, ...]:
        """The kind of gradients that ``method`` reads."""
        return (METHODS[self.method],)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        what = "squared gradients of single samples" if self.method == "fisher" else "estimates of the Hessian's diagonal"
        diagonal = collected(group, self._diagonal(context), what)

        def rises(axis: Axis) -> np.ndarray:
            weight = context.tensor(axis.tensor)
            return sums_along(axis, context, ("hessian", self.method), (weight, weight, diagonal[axis.tensor]))

        members = members_with_gradients(group, diagonal, self.reduction)
        local = 0.5 * np.maximum(local_sums(group, members, rises), 0.0)
        return combine(local, self.reduction, self.normalizer)

    def _diagonal(self, context: ScoreContext) -> Mapping[str, torch.Tensor] | None:
        if context.gradients is None:
            return None
        return context.gradients.fisher if self.method == "fisher" else context.gradients.hessian
