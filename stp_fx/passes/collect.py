"""CollectStatistics and CollectGradients: what calibration data says, left on the graph for criteria and compensation."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.errors import InputError
from stp_fx.ir.provenance import provenance_of
from stp_fx.measure.gradients import Gradients, Loss, collect_gradients
from stp_fx.measure.statistics import Statistics, collect_statistics
from stp_fx.passes.base import GraphPass

__all__ = ["CollectGradients", "CollectStatistics", "collectors_for", "gradients_on", "statistics_on"]

STATISTICS, GRADIENTS = "statistics", "gradients"
_PATCH = 1152
"""Values of a patch up to which least squares looks at all taps: 128 channels under a 3 x 3 kernel, 10 MB in float64."""
_DRAWS = 4
"""Random sign vectors a batch for the diagonal of the Hessian."""


@dataclasses.dataclass(frozen=True)
class CollectStatistics(GraphPass):
    """Mean and variance of every channel at every site; with ``covariance`` the full second moments too.

    ``maps`` keeps the mean of every position (exact mean compensation of padded convolutions reads it), ``patches`` the
    second moments of convolutions' patches of up to so many values (least squares over all taps reads them).

    One collection serves criteria and compensation alike. The graph itself is not changed.

    Raises:
        InputError: no batch, one that does not fit, or activations that are not finite.
    """

    calibration: Iterable[Any] = dataclasses.field(repr=False)
    covariance: bool = False
    maps: bool = False
    patches: int = 0

    def call(self, gm: fx.GraphModule) -> PassResult:
        provenance_of(gm).cache[STATISTICS] = collect_statistics(
            gm, self.calibration, covariance=self.covariance, maps=self.maps, patches=self.patches
        )
        return PassResult(gm, False)


@dataclasses.dataclass(frozen=True)
class CollectGradients(GraphPass):
    """The gradient of ``loss(gm, batch)`` for every parameter; with ``fisher`` the mean square of single samples'
    gradients, with ``hutchinson`` > 0 the Hessian's diagonal from so many random vectors a batch.

    The graph itself is not changed, nor are gradients that its parameters hold.

    Raises:
        InputError: no batch or one that does not fit, a loss that is not a finite scalar, a model whose parameters are
            all frozen.
    """

    calibration: Iterable[Any] = dataclasses.field(repr=False)
    loss: Loss | None = None
    fisher: bool = False
    hutchinson: int = 0

    def call(self, gm: fx.GraphModule) -> PassResult:
        found = collect_gradients(gm, self.calibration, self.loss, fisher=self.fisher, hutchinson=self.hutchinson)
        provenance_of(gm).cache[GRADIENTS] = found
        return PassResult(gm, False)


def collectors_for(needs: Sequence[str], calibration: Iterable[Any] | None, loss: Loss | None = None) -> tuple[GraphPass, ...]:
    """The passes that collect what a criterion or a compensation needs, each reading the data once.

    Raises:
        InputError: something is needed and there is no calibration data.
    """
    found: list[GraphPass] = []
    if calibration is None:
        if needs:
            raise InputError(f"{' and '.join(needs)} must be measured: give `calibration`, an iterable of batches (a DataLoader)")
        return ()
    if not isinstance(calibration, Collection):
        calibration = list(calibration)  # a generator could be read only once
    if {"statistics", "covariance", "maps", "patches"}.intersection(needs):
        patches = _PATCH if "patches" in needs else 0
        found.append(CollectStatistics(calibration, "covariance" in needs, "maps" in needs, patches))
    if {"gradients", "fisher", "hessian"}.intersection(needs):
        found.append(CollectGradients(calibration, loss, "fisher" in needs, _DRAWS if "hessian" in needs else 0))
    return tuple(found)


def gradients_on(gm: fx.GraphModule) -> Gradients | None:
    """What :class:`CollectGradients` left on the graph."""
    return provenance_of(gm).cache.get(GRADIENTS)


def statistics_on(gm: fx.GraphModule) -> Statistics | None:
    """What :class:`CollectStatistics` left on the graph."""
    return provenance_of(gm).cache.get(STATISTICS)
