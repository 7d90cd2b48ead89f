"""Scales of norms: a channel that its norm multiplies by almost zero contributes almost nothing.

Liu et al., "Learning efficient convolutional networks through network slimming", ICCV 2017.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from stp_fx.analysis.groups import Axis, Group
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.magnitude import axis_power_sums
from stp_fx.criteria.reduce import check_combining, combine, first_only, local_sums, members_with
from stp_fx.errors import CriterionError

__all__ = ["BnScale"]


@register("bn_scale")
@dataclasses.dataclass(frozen=True)
class BnScale:
    """|gamma| of every norm scale (and layer scale) of the group, reduced over the scales, normalised in the group.

    A unit that holds several positions of a scale counts the sum of their |gamma|. Scores are never negative. A group
    without a scale raises :class:`CriterionError`.
    """

    reduction: str = "mean"
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_combining(self.reduction, self.normalizer)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        scales = members_with(group, ("scale",))
        if not scales:
            raise CriterionError(
                f"no norm scales the units of group {group.name!r}, so 'bn_scale' has nothing to read; put "
                f"{group.name!r} in `ignore`, or use a criterion that reads weights ('magnitude')"
            )

        def magnitudes(axis: Axis) -> np.ndarray:
            return axis_power_sums(axis, 1.0, context)

        return combine(local_sums(group, first_only(scales, self.reduction), magnitudes), self.reduction, self.normalizer)
