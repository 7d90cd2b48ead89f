"""Distill: the pruned network trained as a whole to give what the original gives."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from stp_fx.passes.by_training import RepairByTraining

__all__ = ["Distill"]


@dataclasses.dataclass(frozen=True)
class Distill(RepairByTraining):
    """Trains the pruned network as a whole on ``calibration``, without labels: its outputs are to be those of the original.

    :class:`ReconstructBlockwise` with the network as its only block: what is trained, the optimizer, the observations held out
    and the arguments are the same. As many steps take about as long, and more memory. Outputs are compared by their mean
    squared error; those of a classifier are its logits, if the network ends with them. After another repair::

        Pipeline(ReconstructBlockwise(batches), Distill(batches, start=None, original=gm), RemoveChannels())

    Raises:
        PassError: no plan.
        PlanError: the plan does not fit.
        InputError: no batch, one that does not fit, values that are not finite, nothing to hold out (a single observation), or an
            ``original`` with other calls or shapes.

    Source: knowledge distillation (arXiv 1503.02531), by logits (Ba and Caruana, arXiv 1312.6184).
    """

    whole: ClassVar[bool] = True
    reported: ClassVar[str] = "distillation"
