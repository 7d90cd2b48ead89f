"""``criterion="auto"``: the criterion that kept the most accuracy in the measured tables, for what is there.

The rule, and what it rests on: means over cells (a network, a target, a scope and a repair) in which several criteria were
measured on the same data, as fractions of accuracy or rank agreement. ``benchmarks/results/auto.md`` has them, by situation and
network.

1. Without calibration data, or where no contraction reads a group: magnitude. In 10 cells of two networks it kept 0.035 more than
   LAMP, 0.031 more than BatchNorm's scales and 0.106 more than FPGM (of each, over the cells that have it); on the ResNet in the
   global scope, BatchNorm's scales kept more.
2. Where kept channels take over what the removed ones gave (any other ``compensation``): reconstruction, which scores what is
   left after just that. In 117 cells with least squares it kept 0.016 more than variance and 0.045 more than magnitude, in 24
   with sequential repair 0.005 more than variance; repair by training, which begins with that, was not measured. Where it cannot
   be computed (see :class:`Reconstruction`), or would take longer than ``longest``: variance.
3. Without, or with "mean": for a network with BatchNorm whose running statistics are not measured again, magnitude (24 cells
   each: 0.063 and 0.032 more than variance), since the norms then go on with the statistics of the unpruned network; otherwise
   variance (48 cells each: 0.056 more than magnitude, 0.001 and 0.024 more than reconstruction).

Whether there are labels, or a ``loss``, changes nothing: Taylor scores kept 0.05 to 0.18 less in every situation that has them.
Hessian scores were not measured. After training (``pat-digits.md``), magnitude, variance and reconstruction differ by less than
seeds do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.groups import Group
from stp_fx.analysis.names import prunable_groups
from stp_fx.analysis.sites import find_sites
from stp_fx.checks import check_flag, is_a, is_number, shown
from stp_fx.criteria.base import Criterion, ScoreContext, needs_of, part, register
from stp_fx.criteria.magnitude import Magnitude
from stp_fx.criteria.reconstruction import Reconstruction, divides_evenly
from stp_fx.criteria.reduce import NORMALIZERS, REDUCTIONS, check_choice
from stp_fx.criteria.variance import Variance
from stp_fx.errors import InputError
from stp_fx.typed import BatchNorm, modules_of

__all__ = ["Auto", "Chosen", "check_auto", "settled"]

_ABSORBING = ("least_squares", "sequential", "blockwise", "distillation")
"""Compensations with which the kept channels take over what the removed ones gave, as reconstruction assumes."""
_COMPENSATIONS = (None, "mean", *_ABSORBING)
_SECONDS = 1.4e-10
"""Of scoring by reconstruction, per cube of an input's positions: 9.6 s for 4096 (benchmarks/results/criteria.md, "square")."""
_WITH_DATA = ("statistics", "covariance")


@part
@dataclasses.dataclass(frozen=True)
class Chosen:
    """The criterion that :class:`Auto` chose, and why; its scores are those of ``criterion``. The report has the reason."""

    criterion: Criterion
    why: str

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that the chosen criterion reads beside weights."""
        return needs_of(self.criterion)

    @property
    def note(self) -> str:
        """One line for reports: the choice and its reason."""
        return f"criterion 'auto' is {type(self.criterion).__name__}: {self.why}"

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        context.note(self.note)
        return self.criterion(group, context)


@register("auto")
@dataclasses.dataclass(frozen=True)
class Auto:
    """Magnitude, variance or reconstruction, by what is there: see the rule in :mod:`stp_fx.criteria.auto`.

    ``prune_graph``, ``PATPassManager``, ``sweep`` and the command line say what is there. A pass :class:`ScoreUnits` goes by what
    has been measured before it, and by the fields: ``compensation`` names what repairs the plan, ``recalibrated`` says that
    BatchNorm's statistics are measured again (in PAT, training does that). ``longest``: the seconds that reconstruction may
    take, as estimated from the widths for the machine of the table, so that the choice does not depend on the machine.
    ``reduction`` (None: the chosen criterion's own) and ``normalizer`` are handed on.

    Raises :class:`InputError` for a field out of range.
    """

    compensation: str | None = None
    recalibrated: bool = False
    longest: float = 600.0
    reduction: str | None = None
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not is_a(self.compensation, str, type(None)) or self.compensation not in _COMPENSATIONS:
            raise InputError(f"unknown compensation {shown(self.compensation)}; known: {', '.join(map(repr, _COMPENSATIONS))}")
        check_flag("recalibrated", self.recalibrated)
        if not is_number(self.longest) or not self.longest >= 0:
            raise InputError(f"`longest` is a number of seconds of at least 0; got {shown(self.longest)}")
        if self.reduction is not None:
            check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("normalizer", self.normalizer, NORMALIZERS)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        chosen = context.cached(("auto", self), lambda: self._for(context))
        return chosen(group, context)

    def choose(self, gm: fx.GraphModule, *, data: bool, ignore: Any = ()) -> Chosen:
        """The criterion for ``gm``, which is only read, and why; nothing is measured.

        Args:
            data: whether there is calibration data.
            ignore: what is kept whole, as for :func:`stp_fx.criteria.score`.

        Raises:
            InputError: a name in ``ignore`` that matches nothing.
            NothingToPruneError: the graph has no unit that may be removed.
        """
        return self._chosen(gm, prunable_groups(gm, analyze(gm), ignore), _WITH_DATA if data else ())

    def _for(self, context: ScoreContext) -> Chosen:
        """The choice by what has been measured."""
        measured = context.statistics
        if measured is None:
            return self._chosen(None, context.groups, ())
        covariance = all(moments.covariance is not None for moments in measured.moments.values())
        return self._chosen(context.graph_module(), context.groups, _WITH_DATA if covariance else ("statistics",))

    def _chosen(self, gm: fx.GraphModule | None, groups: Sequence[Group], measurable: Collection[str]) -> Chosen:
        criterion, why = self._rule(gm, groups, measurable)
        changes: dict[str, Any] = {"normalizer": self.normalizer}
        if self.reduction is not None:
            changes["reduction"] = self.reduction
        return Chosen(dataclasses.replace(criterion, **changes), why)

    def _rule(self, gm: fx.GraphModule | None, groups: Sequence[Group], measurable: Collection[str]) -> tuple[Any, str]:
        if gm is None or "statistics" not in measurable:
            return Magnitude(), "no calibration data, so weights alone are read"
        unread = _unread(gm, groups)
        if unread is not None:
            return Magnitude(), f"no contraction reads every unit of {unread!r}, so nothing can be measured there"
        if self.compensation in _ABSORBING:
            return self._absorbing(gm, groups, measurable)
        repair = "no compensation" if self.compensation is None else f"compensation {self.compensation!r}"
        if not self.recalibrated and _keeps_statistics(gm):
            return Magnitude(), f"{repair}, and BatchNorm keeps the statistics of the unpruned network"
        return Variance(), f"calibration data, and {repair}: nothing takes over what is removed"

    def _absorbing(self, gm: fx.GraphModule, groups: Sequence[Group], measurable: Collection[str]) -> tuple[Any, str]:
        """Reconstruction if it can be computed, else variance."""
        repair = f"compensation {self.compensation!r}"
        if "covariance" not in measurable:
            return Variance(), f"{repair}, but the statistics have no covariance, which reconstruction reads"
        sites = find_sites(gm)
        uneven = next((g.name for g in groups if not all(divides_evenly(m, g) for m in sites.of(g))), None)
        if uneven is not None:
            return Variance(), f"{repair}, but the units of {uneven!r} cannot be reconstructed one by one"
        seconds = sum(_SECONDS * float(len(member.index)) ** 3 for g in groups for member in sites.of(g))
        if seconds > self.longest:
            return Variance(), f"{repair}, but reconstruction would take about {seconds:.0f} s (longest: {self.longest:g} s)"
        return Reconstruction(), f"{repair}, with which kept channels take over what is removed"


def settled(
    criterion: Criterion,
    gm: fx.GraphModule,
    *,
    data: bool,
    ignore: Any = (),
    compensation: str | None = None,
    recalibrated: bool = False,
) -> Criterion:
    """``criterion``; of :class:`Auto`, what it chooses for ``gm`` and this repair, before anything is measured."""
    if not isinstance(criterion, Auto):
        return criterion
    repair = criterion.compensation or compensation
    told = dataclasses.replace(criterion, compensation=repair, recalibrated=recalibrated or criterion.recalibrated)
    return told.choose(gm, data=data, ignore=ignore)


def check_auto(criterion: Criterion, *compensation: str | None, loss: object = None) -> None:
    """Refuses what contradicts :class:`Auto`, beside other criteria nothing; ``compensation`` if the caller repairs the plan.

    Raises:
        InputError: a ``loss``, which no criterion that it chooses reads, or an Auto for another compensation.
    """
    if not isinstance(criterion, Auto):
        return
    if loss is not None:
        raise InputError(
            "`loss` is for criteria that read gradients, and 'auto' chooses none of them; leave `loss` out, or name the "
            "criterion ('taylor', 'hessian')"
        )
    if compensation and criterion.compensation not in (None, *compensation):
        raise InputError(
            f"Auto(compensation={criterion.compensation!r}) chooses for another repair than compensation={compensation[0]!r}; "
            "leave it out of Auto, which follows the argument"
        )


def _unread(gm: fx.GraphModule, groups: Sequence[Group]) -> str | None:
    """The first group with a unit that no contraction reads: no signal of it can be measured."""
    sites = find_sites(gm)
    for group in groups:
        read = np.zeros(group.size, dtype=bool)
        for member in sites.of(group):
            read[member.unit] = True
        if not read.all():
            return group.name
    return None


def _keeps_statistics(gm: fx.GraphModule) -> bool:
    return any(isinstance(module, BatchNorm) and module.running_mean is not None for _, module in modules_of(gm))
