"""Distill: the pruned network trained as a whole to give what the original gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.measure.calibration import reiterable
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.reporting import repaired
from stp_fx.rewrite.blockwise import Start, match
from stp_fx.rewrite.training import Training

__all__ = ["Distill"]


@dataclasses.dataclass(frozen=True)
class Distill(GraphPass):
    """Trains the pruned network as a whole on ``calibration``, without labels: its outputs are to be those of the original.

    :class:`ReconstructBlockwise` with the network as its only block: what is trained, the optimizer, the observations held out
    and the arguments are the same. As many steps take about as long, and more memory. Outputs are compared by their mean
    squared error; those of a classifier are its logits, if the network ends with them.

    Raises:
        PassError: no plan.
        PlanError: the plan does not fit.
        InputError: no batch, one that does not fit, values that are not finite, or nothing to hold out (a single observation).

    Source: knowledge distillation (arXiv 1503.02531), by logits (Ba and Caruana, arXiv 1312.6184).
    """

    repairs: ClassVar[bool] = True
    calibration: Iterable[Any] = dataclasses.field(repr=False)
    steps: int = 200
    rate: float = 0.01
    start: Start | None = "sequential"
    seed: int = 0
    memory: int | None = None
    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        Training(self.steps, self.rate, self.seed).check(self.start, self.memory)

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        reiterable(self.calibration)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        plan = artifacts.planned(type(self).__name__) if self.plan is None else self.plan
        training = Training(self.steps, self.rate, self.seed)
        done = match(gm, plan, self.calibration, training, whole=True, start=self.start, memory=self.memory)
        return repaired(gm, artifacts, plan, "distillation", done)
