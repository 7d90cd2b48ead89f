"""UpdateBatchNormVariance: running variances corrected by formula, without data (report, section 1.5.2)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_number, shown
from stp_fx.errors import InputError
from stp_fx.measure.statistics import Statistics
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.bias import sole_norm
from stp_fx.rewrite.compensation import losing_uses
from stp_fx.rewrite.removal import is_partial
from stp_fx.rewrite.slicing import copied
from stp_fx.typed import from_numpy

__all__ = ["UpdateBatchNormVariance"]


@dataclasses.dataclass(frozen=True)
class UpdateBatchNormVariance(GraphPass):
    """``var_i -= sum over the removed units j of W_ij^2 var_j``, for the BatchNorm after each consumer, without data.

    Assumes that channels are independent of each other, and positions under a kernel too (report, section 1.5.1, last
    equation); :class:`RecalibrateBatchNorm` assumes nothing and is better where there is data. Variances stay at
    least at ``floor`` times what they were. For a graph that is compensated (the means are right) and not yet masked or
    removed; ``plan`` and ``statistics`` default to what earlier passes made.

    Raises:
        PassError: no plan, or no statistics.
        PlanError: the plan does not fit.
    """

    repairs: ClassVar[bool] = True
    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)
    statistics: Statistics | None = dataclasses.field(default=None, repr=False)
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not is_number(self.floor) or not 0 < self.floor <= 1:
            raise InputError(f"the floor of a variance is a fraction in (0, 1] of what it was; got {shown(self.floor)}")

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        name = type(self).__name__
        plan = artifacts.planned(name) if self.plan is None else self.plan
        statistics = artifacts.statistics_for(gm, name, self.statistics)
        graph = analyze(gm)
        result = copied(gm)
        changed = 0
        for use in losing_uses(gm, graph, graph.survivors(plan, partial=is_partial(gm))):
            norm = sole_norm(result, use.consumer.node)
            if norm is None or norm.running_var is None:
                continue
            matrix = use.consumer.matrix(use.consumer.current(gm).detach().double().cpu())
            lost = _lost_variance(matrix, statistics.of(use.consumer.site).variance, use.removed)
            before = norm.running_var.double().cpu()
            after = torch.maximum(before - lost, before * self.floor)
            norm.running_var.copy_(after)
            changed += 1
        return Outcome(result, changed > 0, artifacts.carried_to(result).with_(plan=plan))


def _lost_variance(matrix: torch.Tensor, variance: torch.Tensor, removed: np.ndarray[Any, Any]) -> torch.Tensor:
    """``sum_j W_ij^2 var_j`` over the removed inputs and all taps: float64 [out]; ``matrix`` is [groups, out, in, taps]."""
    weights = matrix.square().sum(-1)
    lost = (variance * from_numpy(removed)).reshape(len(matrix), -1)
    return torch.einsum("goi,gi->go", weights, lost).reshape(-1)
