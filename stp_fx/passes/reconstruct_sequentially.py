"""ReconstructSequentially: layers refitted in order, each on what it reads in the network as pruned and repaired so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import check_flag, check_whole
from stp_fx.measure.calibration import reiterable
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.reporting import repaired
from stp_fx.rewrite.sequential import reconstruct

__all__ = ["ReconstructSequentially"]


@dataclasses.dataclass(frozen=True)
class ReconstructSequentially(GraphPass):
    """Refits the kept weights of linear layers and convolutions, layer after layer, on ``calibration``.

    A layer's weight becomes the one nearest to the present whose output, for what the layer reads in the network *as pruned and
    repaired so far*, is closest to that of the original layer: ``W' = W + Cov(r, x) (Cov(x) + ridge D)^-1`` with r what the
    output lacks and D the variances of x. So damage does not add up along the depth. Where the output goes into a sum with an
    earlier value (a residual stream), r is what the sum lacks, if ``residuals``. The ridge is chosen for each layer, by
    observations held out, and a layer that would gain nothing keeps its weight.

    For linear layers, attention projections, and convolutions of 1 to 3 dimensions: grouped, depthwise, strided, dilated,
    transposed. The mean goes into the bias, or into the running mean of the BatchNorm after it; a layer with neither is fitted
    without intercept, so that no parameter is added. Weights that are computed from others or read by several calls stay, and
    are named in the log. BatchNorm needs no recalibration afterwards: what it reads is what it read before.

    Where the plan removes blocks (:class:`SelectBlocks`), the layers after them are refitted alike. With ``merge``, the layer
    before a run of them is refitted so that its sum is what the original stream is behind the run, if nothing else reads it.

    Every batch runs through both networks once. A layer is observed at output positions drawn at random from all batches,
    32 for each of its inputs and at least 32,768, always the same ones. Values in between are kept, ``memory`` bytes of them in
    memory (None: half of what is free), the others in temporary files. ``plan`` defaults to the one of :class:`SelectUnits` in
    the same pipeline. Layers should give the values of ``original``, by default the graph that the pass is given: hand it
    over where an earlier repair has changed that one already, as for a second pass over the network.

    Raises:
        PassError: no plan.
        PlanError: the plan does not fit.
        InputError: no batch, one that does not fit, values that are not finite, or an ``original`` with other calls or shapes.

    Source: asymmetric layer-wise reconstruction as in GPTAQ (arXiv 2504.02692), for whole channels; ridge regression (Hoerl and
    Kennard 1970); ``merge``: ReplaceMe (arXiv 2505.02819), with the whole layer refitted in place of a map behind it.
    """

    repairs: ClassVar[bool] = True
    calibration: Iterable[Any] = dataclasses.field(repr=False)
    residuals: bool = True
    memory: int | None = None
    original: fx.GraphModule | None = dataclasses.field(default=None, repr=False)
    merge: bool = True
    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_flag("residuals", self.residuals)
        check_flag("merge", self.merge)
        if self.memory is not None:
            check_whole("memory", self.memory, 0)

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        reiterable(self.calibration)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        plan = artifacts.planned(type(self).__name__) if self.plan is None else self.plan
        done = reconstruct(
            gm,
            plan,
            self.calibration,
            residuals=self.residuals,
            memory=self.memory,
            original=self.original,
            merge=self.merge,
        )
        return repaired(gm, artifacts, plan, "sequential", done)
