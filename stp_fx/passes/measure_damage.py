"""MeasureDamage: what the output loses when so much of a group is removed, for ``allocation="optimal"``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import fx

from stp_fx.checks import check_whole, is_choice, is_number, listed_argument, shown
from stp_fx.errors import InputError
from stp_fx.measure.calibration import reiterable
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.compensations import Compensation
from stp_fx.rewrite.compensation import LeastSquares, MeanShift, Method
from stp_fx.selection.damage import NEEDS, measure_damages
from stp_fx.selection.selection import Selection

__all__ = ["MeasureDamage", "damage_for"]

_METHODS: dict[str, Method] = {"mean": MeanShift(), "least_squares": LeastSquares()}


@dataclasses.dataclass(frozen=True)
class MeasureDamage(GraphPass):
    """Measures, for every group that was scored, how the error of the network's output grows with the units that it loses.

    It runs between :class:`ScoreUnits` and :class:`SelectUnits`, after ``CollectStatistics(..., covariance=True)``. From the
    statistics it works out what the layers that read a group lose at every number of units; then each group alone is masked at a
    few ``fractions`` (its consumers compensated by ``compensation``: None, "mean" or "least_squares"), and the error of the
    output on the first ``samples`` of ``calibration`` scales its curve. That costs ``len(fractions)`` forward passes over these
    samples a group. ``fractions=()`` runs nothing and takes the layers' own relative losses, which do not compare well between
    attention and other layers.

    Raises:
        InputError: an argument out of range, or batches that do not fit.
        PassError: no scores, or no statistics.
    """

    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    calibration: Iterable[Any] = dataclasses.field(repr=False)
    compensation: str | None = "least_squares"
    samples: int = 256
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        if self.compensation is not None and not is_choice(self.compensation, _METHODS):
            raise InputError(f"unknown compensation {shown(self.compensation)}; known: None, {', '.join(map(repr, _METHODS))}")
        check_whole("samples", self.samples, 1)
        wanted = "give fractions of a group, rising, in (0, 1)"
        fractions = listed_argument("fractions", self.fractions, wanted)
        if not all(is_number(each) and 0 < each < 1 for each in fractions) or list(fractions) != sorted(set(fractions)):
            raise InputError(f"`fractions` is {shown(self.fractions)}: {wanted}")
        object.__setattr__(self, "fractions", tuple(map(float, fractions)))

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        reiterable(self.calibration)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        scores = artifacts.scored("MeasureDamage")
        statistics = artifacts.statistics_for(gm, "MeasureDamage")
        method = None if self.compensation is None else _METHODS[self.compensation]
        found = measure_damages(
            gm, scores, statistics, self.calibration, method=method, samples=self.samples, fractions=self.fractions
        )
        return Outcome(gm, False, artifacts.with_(damages=found))


def damage_for(selection: Selection, compensation: str | None, data: Any, argument: str = "calibration") -> Compensation:
    """The data that a selection needs beside scores: for ``allocation="optimal"``, covariances and a :class:`MeasureDamage`.

    ``compensation``: the name of the one that repairs the plan. Damages are measured with it, or with the closest that reads
    statistics alone. ``argument``: what the caller calls ``data``.

    Raises:
        InputError: no data to measure on.
    """
    if selection.allocation != "optimal":
        return Compensation()
    if data is None:
        raise InputError(f"allocation='optimal' measures damages: give `{argument}`, an iterable of batches")
    closest = compensation if compensation is None or compensation in _METHODS else "least_squares"
    needs = ("covariance",) if closest is None else NEEDS
    return Compensation(needs, (MeasureDamage(reiterable(data, argument), closest),))
