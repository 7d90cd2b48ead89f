"""Geometric median: the filter that is nearest to all others of its layer is the one that they can best stand in for.

He et al., "Filter pruning via geometric median for deep neural networks acceleration", CVPR 2019, equation 7.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from stp_fx.analysis.groups import Group, Member
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.reduce import check_combining, combine, scored_members

__all__ = ["Fpgm"]

_BLOCK = 512
"""Vectors compared with all others at a time: bounds the temporary memory to 512 x units numbers."""


@register("fpgm")
@dataclasses.dataclass(frozen=True)
class Fpgm:
    """Sum of the L2 distances from a unit's weights to those of every other unit of the group, on every weight axis.

    The positions that a unit holds on an axis are one vector, in the order of their indices. Weights count, on output
    and input axes; "first" takes the first output axis alone, which is the paper's criterion. A group without weights
    is scored by its scales, one without either by its biases and other parameters. Scores are never negative.

    All pairs are compared: time is quadratic in the units of a group, as the definition has it, where weight norms are
    linear. Distances are float64.
    """

    reduction: str = "mean"
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_combining(self.reduction, self.normalizer)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        members = scored_members(group, self.reduction, (("weight",), ("scale",), ("bias", "other")))
        local = np.stack([_distance_sums(_vectors(member, group, context)) for member in members])
        return combine(local, self.reduction, self.normalizer)


def _vectors(member: Member, group: Group, context: ScoreContext) -> torch.Tensor:
    """One row a unit: its positions after each other, float64 [units, positions * rest]; zeros where a unit has fewer."""
    weight = context.tensor(member.axis.tensor).detach()
    rows = weight.movedim(member.axis.dim, 0).reshape(weight.shape[member.axis.dim], -1)
    order = np.argsort(member.unit, kind="stable")
    unit, counts = member.unit[order], np.bincount(member.unit, minlength=group.size)
    place = np.arange(len(unit)) - (np.cumsum(counts) - counts)[unit]
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device  # no float64 there
    vectors = torch.zeros(group.size, int(counts.max(initial=0)), rows.shape[1], dtype=torch.float64, device=device)
    vectors[torch.from_numpy(unit), torch.from_numpy(place)] = rows[torch.from_numpy(member.index[order])].to(
        device, torch.float64
    )
    return vectors.flatten(1)


def _distance_sums(vectors: torch.Tensor) -> np.ndarray:
    """Sum of the distances from each row to all others: float64 [rows]. Each pair is computed once."""
    vectors = vectors - vectors.mean(0)  # distances are unchanged, and |a|^2 + |b|^2 - 2ab loses fewer digits
    squares = vectors.square().sum(1)
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    for start in range(0, len(vectors), _BLOCK):
        stop = min(start + _BLOCK, len(vectors))
        block = squares[start:stop, None] + squares[None, start:]
        block.addmm_(vectors[start:stop], vectors[start:].T, alpha=-2.0)
        distances = block.clamp_min_(0.0).sqrt_()
        distances[:, : stop - start].fill_diagonal_(0.0)
        total[start:stop] += distances.sum(1)
        total[stop:] += distances[:, stop - start :].sum(0)
    return total.cpu().numpy()
