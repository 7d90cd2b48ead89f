"""CollectGradients: the gradient of a loss for every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import fx

from stp_fx.checks import check_callable, check_flag, check_whole
from stp_fx.measure.calibration import reiterable
from stp_fx.measure.gradients import Loss, collect_gradients
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass

__all__ = ["CollectGradients"]


@dataclasses.dataclass(frozen=True)
class CollectGradients(GraphPass):
    """The gradient of ``loss(gm, batch)`` for every parameter; with ``fisher`` the mean square of single samples'
    gradients, with ``hutchinson`` > 0 the Hessian's diagonal from so many random vectors a batch.

    Gradients that the parameters hold are not changed.

    Raises:
        InputError: no batch or one that does not fit, a loss that is not a finite scalar, a model whose parameters are
            all frozen.
    """

    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    calibration: Iterable[Any] = dataclasses.field(repr=False)
    loss: Loss | None = dataclasses.field(default=None, repr=False)
    fisher: bool = False
    hutchinson: int = 0

    def __post_init__(self) -> None:
        check_flag("fisher", self.fisher)
        check_whole("hutchinson", self.hutchinson, 0)
        check_callable("loss", self.loss, "(graph, batch) -> scalar")

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        reiterable(self.calibration)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        found = collect_gradients(gm, self.calibration, self.loss, fisher=self.fisher, hutchinson=self.hutchinson)
        return Outcome(gm, False, artifacts.with_(measured=dataclasses.replace(artifacts.measured, gradients=found)))
