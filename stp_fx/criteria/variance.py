"""Variance-based pruning: a unit whose signal hardly varies is nearly a constant, which a bias can stand in for.

arXiv 2507.12988; report, section 1.3.3: the population variance of the post-activation value, each spatial position or
token an observation.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from stp_fx.analysis.groups import Group
from stp_fx.analysis.sites import SiteMember
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.reduce import check_combining, combine
from stp_fx.errors import CriterionError

__all__ = ["Variance"]


@register("variance")
@dataclasses.dataclass(frozen=True)
class Variance:
    """Population variance of a unit where contractions read it, reduced over these inputs, normalised in the group.

    With one position per unit at an input, this is the report's formula; of several positions (a head, a flattened map) the
    mean of their variances counts. "first" and "gate" take the first input in graph order. Scores are never negative.

    Raises :class:`CriterionError` without statistics, and for a unit that no contraction reads.
    """

    reduction: str = "mean"
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ("statistics",)

    def __post_init__(self) -> None:
        check_combining(self.reduction, self.normalizer)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        members = context.site_members(group)
        positions = np.stack([np.bincount(member.unit, minlength=group.size) for member in members])
        unread = np.flatnonzero(positions.sum(axis=0) == 0)
        if len(unread):
            raise CriterionError(
                f"no contraction reads unit {unread[0]} of group {group.name!r} ({len(unread)} such units), so it has no "
                "statistics; put the group in `ignore`, or use a criterion that reads weights"
            )
        sums = np.stack([_variance_sums(member, group, context) for member in members])
        # An activation input that does not read a unit gets no signal from it: its sum is 0.
        return combine(sums / np.maximum(positions, 1), self.reduction, self.normalizer)


def _variance_sums(member: SiteMember, group: Group, context: ScoreContext) -> np.ndarray:
    assert context.statistics is not None
    variance = context.statistics.of(member.site).variance.numpy()
    return np.bincount(member.unit, weights=variance[member.index], minlength=group.size)
