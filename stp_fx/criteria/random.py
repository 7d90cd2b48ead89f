"""Random scores: the baseline every criterion has to beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from stp_fx.analysis.groups import Group
from stp_fx.checks import check_seed
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.reduce import check_combining, combine

__all__ = ["Random"]


@register("random")
@dataclasses.dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1), a function of the seed and the group's index alone.

    Neither the device nor any global random state matters, so that all ranks of a distributed job agree. ``seed`` is an
    integer of at least 0; None takes the context's. There is one draw a unit, not one an axis, so that every
    ``reduction`` gives the same; ``normalizer`` applies as to any criterion.
    """

    seed: int | None = None
    reduction: str = "mean"
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ()
    reads_weights: ClassVar[bool] = False
    """So that models on the meta device can be planned."""

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed(self.seed)
        check_combining(self.reduction, self.normalizer)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        seed = context.seed if self.seed is None else self.seed
        check_seed(seed)
        local = np.random.default_rng([seed, group.index]).random((1, group.size))
        return combine(local, self.reduction, self.normalizer)
