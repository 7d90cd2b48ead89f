"""``measure``: all measurements of a graph on calibration data, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from stp_fx.errors import InputError
from stp_fx.measure.calibration import reiterable
from stp_fx.measure.gradients import Gradients, Loss, collect_gradients
from stp_fx.measure.statistics import Statistics, collect_statistics

__all__ = ["Measured", "Reading", "measure", "reading_for"]

_PATCH = 1152
"""Values of a patch up to which least squares uses all taps: 128 channels under a 3 x 3 kernel, 10 MB in float64."""
_DRAWS = 4
"""Random sign vectors a batch for the diagonal of the Hessian."""
_OF_STATISTICS = ("statistics", "covariance", "maps", "patches")
_OF_GRADIENTS = ("gradients", "fisher", "hessian")


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """``statistics`` of every contraction's activation input and ``gradients`` of a loss; each None if it was not collected."""

    statistics: Statistics | None = None
    gradients: Gradients | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """The collections to run: arguments of :func:`collect_statistics` and :func:`collect_gradients`, None for neither."""

    statistics: dict[str, Any] | None = None
    gradients: dict[str, Any] | None = None


def reading_for(needs: Sequence[str], data: object) -> Reading:
    """The collections that the named needs (of criteria, of compensation) ask for.

    Raises:
        InputError: something is needed and ``data`` is None.
    """
    if data is None:
        if needs:
            raise InputError(f"{' and '.join(needs)} must be measured: give `calibration`, an iterable of batches (a DataLoader)")
        return Reading()
    wanted = set(needs)
    statistics = gradients = None
    if wanted.intersection(_OF_STATISTICS):
        patches = _PATCH if "patches" in wanted else 0
        statistics = {"covariance": "covariance" in wanted, "maps": "maps" in wanted, "patches": patches}
    if wanted.intersection(_OF_GRADIENTS):
        gradients = {"fisher": "fisher" in wanted, "hutchinson": _DRAWS if "hessian" in wanted else 0}
    return Reading(statistics, gradients)


def measure(gm: fx.GraphModule, needs: Sequence[str], batches: Iterable[Any] | None, loss: Loss | None = None) -> Measured:
    """Collects the named ``needs`` (see :data:`stp_fx.criteria.NEEDS`) from ``batches``; ``gm`` is only read.

    A loader is iterated once for statistics and once for gradients; of a one-shot iterator the batches are kept.

    Raises:
        InputError: no batches where something is needed, batches that do not fit, a loss that is not a finite scalar.
    """
    reading = reading_for(needs, batches)
    if reading == Reading():
        return Measured()
    data = reiterable(batches)
    statistics = None if reading.statistics is None else collect_statistics(gm, data, **reading.statistics)
    return Measured(statistics, None if reading.gradients is None else collect_gradients(gm, data, loss, **reading.gradients))
