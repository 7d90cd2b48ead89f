"""CollectStatistics: means and variances of the activation inputs of all contractions, over calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import fx

from stp_fx.checks import check_flag, check_whole
from stp_fx.measure.calibration import reiterable
from stp_fx.measure.statistics import collect_statistics
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass

__all__ = ["CollectStatistics"]


@dataclasses.dataclass(frozen=True)
class CollectStatistics(GraphPass):
    """Mean and variance of every channel at the activation input of every contraction; with ``covariance`` the full second
    moments too.

    ``maps`` keeps the mean of every position (needed for exact mean compensation of padded convolutions), ``patches`` the
    second moments of convolutions' patches of up to so many values (needed for least squares over all taps).

    One collection serves criteria and compensation alike: they are artifacts of the pipeline.

    Raises:
        InputError: no batch, one that does not fit, or activations that are not finite.
    """

    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    calibration: Iterable[Any] = dataclasses.field(repr=False)
    covariance: bool = False
    maps: bool = False
    patches: int = 0

    def __post_init__(self) -> None:
        check_flag("covariance", self.covariance)
        check_flag("maps", self.maps)
        check_whole("patches", self.patches, 0)

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        reiterable(self.calibration)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        found = collect_statistics(gm, self.calibration, covariance=self.covariance, maps=self.maps, patches=self.patches)
        return Outcome(gm, False, artifacts.with_(measured=dataclasses.replace(artifacts.measured, statistics=found)))
