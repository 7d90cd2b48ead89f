"""Compensations by name: what has to be measured for each, and its passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

from stp_fx.checks import is_a, shown
from stp_fx.errors import InputError
from stp_fx.passes.base import GraphPass
from stp_fx.passes.compensate_least_squares import CompensateLeastSquares
from stp_fx.passes.compensate_mean import CompensateMean
from stp_fx.passes.distill import Distill
from stp_fx.passes.reconstruct_blockwise import ReconstructBlockwise
from stp_fx.passes.reconstruct_sequentially import ReconstructSequentially

__all__ = ["Compensation", "CompensationName", "compensation_named"]

CompensationName = Literal["mean", "least_squares", "sequential", "blockwise", "distillation"]


@dataclasses.dataclass(frozen=True)
class Compensation:
    """``needs``: of :data:`stp_fx.measure.measured`; ``passes`` run between selection and rewrite."""

    needs: tuple[str, ...] = ()
    passes: tuple[GraphPass, ...] = ()


_COMPENSATIONS: dict[str, Callable[[Iterable[Any]], Compensation]] = {
    "mean": lambda data: Compensation(("maps",), (CompensateMean(),)),
    "least_squares": lambda data: Compensation(("maps", "covariance", "patches"), (CompensateLeastSquares(),)),
    "sequential": lambda data: Compensation((), (ReconstructSequentially(data),)),
    "blockwise": lambda data: Compensation((), (ReconstructBlockwise(data),)),
    "distillation": lambda data: Compensation((), (Distill(data),)),
}


def compensation_named(name: str | None, data: Iterable[Any] | None, argument: str = "calibration") -> Compensation:
    """The compensation of that name; None for none. ``argument``: what the caller calls ``data``.

    Raises:
        InputError: an unknown name, or no calibration data for it to read.
    """
    if name is None:
        return Compensation()
    if not is_a(name, str) or name not in _COMPENSATIONS:
        raise InputError(f"unknown compensation {shown(name)}; known: None, {', '.join(map(repr, _COMPENSATIONS))}")
    if data is None:
        raise InputError(f"compensation {name!r} measures activations: give `{argument}`, an iterable of batches")
    return _COMPENSATIONS[name](data)
