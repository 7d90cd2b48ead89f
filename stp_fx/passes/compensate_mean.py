"""CompensateMean: consumers' biases take over the mean of the removed inputs (report, section 1.5.1)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.measure.statistics import Statistics
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.reporting import with_compensation
from stp_fx.rewrite.compensation import MeanShift, Method, compensate

__all__ = ["CompensateMean"]


@dataclasses.dataclass(frozen=True)
class CompensateMean(GraphPass):
    """``b += sum over the removed units of W mu``: the consumers' expected output stays what it was.

    For linear layers, convolutions (grouped, strided, dilated, transposed, of 1 to 3 dimensions), attention projections and
    computed weights. With zero padding a tap does not lie inside everywhere; where :class:`CollectStatistics` kept
    ``maps``, the shift is the exact mean over all output positions, else that of a constant channel. A consumer without
    bias gets one, unless its only consumer is a BatchNorm: then the shift goes into the running mean, which costs nothing.
    A weight that is used several times gets the mean of its uses' shifts.

    ``plan`` and ``statistics`` default to what earlier passes of the pipeline made. The result has the input's shapes; the
    plan, the scores and the statistics stay valid for :class:`MaskChannels` or :class:`RemoveChannels`.

    Raises:
        PassError: no plan, or no statistics.
        PlanError: the plan does not fit.
        InputError: statistics of another graph or of other weights.
    """

    repairs: ClassVar[bool] = True
    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)
    statistics: Statistics | None = dataclasses.field(default=None, repr=False)

    def method(self) -> Method:
        """How a consumer is compensated."""
        return MeanShift()

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        name = type(self).__name__
        plan = artifacts.planned(name) if self.plan is None else self.plan
        statistics = artifacts.statistics_for(gm, name, self.statistics)
        result, by_group = compensate(gm, plan, statistics, self.method())
        report = artifacts.report and with_compensation(artifacts.report, self.method().name, by_group)
        return Outcome(result, True, artifacts.carried_to(result).with_(plan=plan, report=report))
