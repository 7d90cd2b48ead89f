"""BatchNorm after pruning: statistics measured again, or corrected by formula where there is no data left.

Report, sections 1.5.2 and 1.5.3.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.modules.batchnorm import _BatchNorm

from stp_fx.analysis.build import analyze
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import InputError, PassError
from stp_fx.measure.calibration import arguments_of, batches, evaluating
from stp_fx.measure.statistics import Statistics
from stp_fx.passes.base import GraphPass
from stp_fx.passes.collect import statistics_on
from stp_fx.passes.compensate import losing_uses
from stp_fx.passes.planning import carry_over, is_partial, planned
from stp_fx.rewrite.bias import sole_norm
from stp_fx.rewrite.slicing import copied

__all__ = ["RecalibrateBatchNorm", "UpdateBatchNormVariance"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RecalibrateBatchNorm(GraphPass):
    """Measures the running statistics of every BatchNorm again, on up to ``limit`` batches of ``calibration``.

    They are reset, then averaged over the batches with equal weights (not blended by momentum), without gradients, the
    BatchNorms in train mode and everything else in eval mode. Nothing else moves; train/eval flags and momenta are as
    before. A graph without BatchNorm comes back unchanged. A batch needs more than one value a channel.

    Raises:
        InputError: no batch, one that does not fit, or one that leaves statistics that are not finite.
    """

    calibration: Iterable[Any] = dataclasses.field(repr=False)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and (isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1):
            raise InputError(f"the limit of a recalibration is a number of batches, at least 1; got {self.limit!r}")

    def call(self, gm: fx.GraphModule) -> PassResult:
        result = copied(gm)
        norms = dict(_norms(result))
        if not norms:
            _log.info("the graph has no BatchNorm with running statistics, so there is nothing to recalibrate")
            return PassResult(gm, False)
        momenta = {norm: norm.momentum for norm in norms.values()}
        with torch.no_grad(), evaluating(result):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.train().momentum = None  # torch's cumulative average
            for batch in islice(batches(result, self.calibration, "recalibrating BatchNorm"), self.limit):
                result(*arguments_of(result, batch))
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        _check_finite(norms)
        _keep_plan(gm, result)
        return PassResult(result, True)


@dataclasses.dataclass(frozen=True)
class UpdateBatchNormVariance(GraphPass):
    """``var_i -= sum over the units j that go of W_ij^2 var_j``, for the BatchNorm behind each consumer: no data is read.

    Assumes that channels are independent of each other, and positions under a kernel too (report, section 1.5.1, last
    equation); :class:`RecalibrateBatchNorm` assumes nothing and is better wherever there is data. Variances stay at
    least at ``floor`` times what they were. For a graph that is compensated (the means are right) and not yet masked or
    removed; ``plan`` and ``statistics`` default to what earlier passes left on it.

    Raises:
        PassError: no plan, or no statistics.
        PlanError: the plan does not fit.
    """

    plan: PrunePlan | None = None
    statistics: Statistics | None = dataclasses.field(default=None, repr=False)
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.floor, (int, float)) or not 0 < self.floor <= 1:
            raise InputError(f"the floor of a variance is a fraction in (0, 1] of what it was; got {self.floor!r}")

    def call(self, gm: fx.GraphModule) -> PassResult:
        plan = planned(gm) if self.plan is None else self.plan
        statistics = statistics_on(gm) if self.statistics is None else self.statistics
        if statistics is None:
            raise PassError("UpdateBatchNormVariance needs statistics: run CollectStatistics before it")
        graph = analyze(gm)
        result = copied(gm)
        changed = 0
        for use in losing_uses(gm, graph, graph.survivors(plan, partial=is_partial(gm))):
            norm = sole_norm(result, use.consumer.node)
            if norm is None or norm.running_var is None:
                continue
            matrix = use.consumer.matrix(use.consumer.current(gm).detach().double().cpu())
            lost = _lost_variance(matrix, statistics.of(use.consumer.site).variance, use.dead)
            before = norm.running_var.double().cpu()
            after = torch.maximum(before - lost, before * self.floor)
            norm.running_var.copy_(after)
            changed += 1
        carry_over(gm, result, plan)
        return PassResult(result, changed > 0)


def _lost_variance(matrix: torch.Tensor, variance: torch.Tensor, dead: np.ndarray) -> torch.Tensor:
    """``sum_j W_ij^2 var_j`` over the dead inputs and all taps: float64 [out]; ``matrix`` is [groups, out, in, taps]."""
    weights = matrix.square().sum(-1)
    lost = (variance * torch.from_numpy(dead)).reshape(len(matrix), -1)
    return torch.einsum("goi,gi->go", weights, lost).reshape(-1)


def _norms(gm: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in gm.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def _check_finite(norms: dict[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if not bool(torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
            raise InputError(
                f"recalibrating left {name!r} with statistics that are not finite: the calibration data or the weights "
                "before it are not, or a batch had a single value a channel"
            )


def _keep_plan(gm: fx.GraphModule, result: fx.GraphModule) -> None:
    try:
        carry_over(gm, result, planned(gm))
    except PassError:
        return
