"""Taylor expansion of the loss, first order: the change of the loss when a unit's weights become zero.

Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017, and "Importance
estimation for neural network pruning", CVPR 2019, equations 7 and 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from stp_fx.analysis.groups import Axis, Group, Member
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.reduce import check_choice, check_combining, combine, first_only, local_sums, scored_members
from stp_fx.criteria.sums import sums_along
from stp_fx.errors import CriterionError

__all__ = ["Taylor", "collected", "members_with_gradients"]

FORMS = ("multivariate", "elementwise")


@register("taylor")
@dataclasses.dataclass(frozen=True)
class Taylor:
    """Weights times the mean gradient of the loss, on every axis of the group, reduced over the axes.

    ``form`` "multivariate": |sum of w * g| over all elements of the unit on an axis, the first-order change of the loss
    when all of them become zero together; "elementwise": the sum of |w * g|, in which elements do not cancel. Scores are
    never negative. A frozen parameter, or one that the loss does not reach, has no gradient and is left out; a group of
    only such parameters raises :class:`CriterionError`.
    """

    form: str = "multivariate"
    reduction: str = "mean"
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ("gradients",)

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        check_combining(self.reduction, self.normalizer)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        gradients = collected(group, context.gradients and context.gradients.mean, "gradients")
        members = members_with_gradients(group, gradients, self.reduction)

        def products(axis: Axis) -> np.ndarray:
            factors = (context.tensor(axis.tensor), gradients[axis.tensor])
            return sums_along(axis, context, ("taylor", self.form), factors, absolute=self.form == "elementwise")

        return combine(np.abs(local_sums(group, members, products)), self.reduction, self.normalizer)


def collected(group: Group, known: Mapping[str, torch.Tensor] | None, what: str) -> Mapping[str, torch.Tensor]:
    """``known``; raises :class:`CriterionError` if nobody collected it."""
    if known is None:
        raise CriterionError(
            f"group {group.name!r} cannot be scored: this criterion reads {what}, and none were collected; give "
            "`calibration` (and `loss`), or run CollectGradients before ScoreUnits"
        )
    return known


def members_with_gradients(group: Group, known: Mapping[str, torch.Tensor], reduction: str) -> tuple[Member, ...]:
    """The scored axes whose parameters are among ``known``.

    Raises:
        CriterionError: none of the group's parameters has a gradient; names them.
    """
    members = scored_members(group, "mean")
    found = tuple(member for member in members if member.axis.tensor in known)
    if not found:
        raise CriterionError(
            f"no parameter of group {group.name!r} has a gradient: {_names(members)} frozen, or not reached by the loss; "
            "call requires_grad_(True) on one of them, put the group in `ignore`, or use a criterion without gradients"
        )
    return first_only(found, reduction)


def _names(members: Sequence[Member]) -> str:
    names = list(dict.fromkeys(member.axis.tensor for member in members))
    shown = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
