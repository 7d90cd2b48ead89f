"""Magnitude: the norm of the weights that belong to a unit. No data needed.

Li et al., "Pruning filters for efficient convnets", ICLR 2017, over all axes of a group as in DepGraph (Fang et al.,
CVPR 2023); report, sections 1.3.1 and 1.3.2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import torch

from stp_fx.analysis.groups import Axis, Group
from stp_fx.checks import is_number, shown
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.norms import power_sums
from stp_fx.criteria.reduce import check_combining, combine, local_sums, scored_members
from stp_fx.errors import CriterionError, InputError

__all__ = ["Magnitude", "lamp"]


@register("magnitude")
@dataclasses.dataclass(frozen=True)
class Magnitude:
    """p-norm of each unit's weights on every axis of the group, reduced over the axes, normalised in the group.

    On one axis a unit's score is the norm of all its positions together, over all other dimensions of the weight.
    Weights (output and input axes; a weight that the group touches on both counts on both) and norm scales
    contribute, biases and buffers do not. A group that has only biases or other parameters (a learned token, a
    positional embedding) is scored by the norms of those.

    ``p`` > 0; ``reduction`` is one of mean, max, sum, prod, first (or gate: the group's first weight axis alone);
    ``normalizer`` is one of none, mean, max, gaussian, lamp.
    """

    p: float = 2.0
    reduction: str = "mean"
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not is_number(self.p) or not 0 < self.p < math.inf:
            raise InputError(f"the p of a magnitude norm is a finite number above 0; got {shown(self.p)}")
        check_combining(self.reduction, self.normalizer)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        members = scored_members(group, self.reduction)
        powers = local_sums(group, members, lambda axis: axis_power_sums(axis, self.p, context))
        local = np.sqrt(powers) if self.p == 2 else powers ** (1.0 / self.p)
        return combine(local, self.reduction, self.normalizer)


@register("lamp")
def lamp(p: float = 2.0, reduction: str = "mean") -> Magnitude:
    """Magnitude under the LAMP normaliser (arXiv 2010.07611), which makes scores of different groups comparable."""
    return Magnitude(p=p, reduction=reduction, normalizer="lamp")


def axis_power_sums(axis: Axis, p: float, context: ScoreContext) -> np.ndarray:
    """Sum of |w|^p for every index of ``axis``: float64 [axis size]. One read of the tensor serves all axes in use."""
    key = ("power_sums", axis.tensor, float(p), axis.dim)
    if key not in context.cache:
        tensor = context.tensor(axis.tensor)
        if not tensor.is_floating_point():
            raise CriterionError(f"{axis.tensor!r} has dtype {tensor.dtype}; only floating-point weights can be scored")
        dims = sorted({axis.dim, *context.dims.get(axis.tensor, ())})
        for dim, sums in power_sums(tensor, float(p), dims).items():
            context.cache["power_sums", axis.tensor, float(p), dim] = sums
    return context.cache[key]
