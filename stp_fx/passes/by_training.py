"""The common parts of passes that repair by training."""

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

__all__ = ["RepairByTraining"]


@dataclasses.dataclass(frozen=True)
class RepairByTraining(GraphPass, abstract=True):
    """Trains ``whole`` networks or their blocks; ``reported`` is the name of the repair in reports."""

    repairs: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    reported: ClassVar[str]
    calibration: Iterable[Any] = dataclasses.field(repr=False)
    steps: int = 200
    rate: float = 0.01
    start: Start | None = "sequential"
    seed: int = 0
    memory: int | None = None
    original: fx.GraphModule | None = dataclasses.field(default=None, repr=False)
    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        Training(self.steps, self.rate, self.seed).check(self.start, self.memory)

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        reiterable(self.calibration)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        plan = artifacts.planned(type(self).__name__) if self.plan is None else self.plan
        training = Training(self.steps, self.rate, self.seed)
        target, start = self.original, self.start
        done = match(gm, plan, self.calibration, training, whole=self.whole, start=start, memory=self.memory, original=target)
        return repaired(gm, artifacts, plan, self.reported, done)
