"""``measure_damages``: what the network's output loses when so many units of one group are removed.

The curves of :mod:`stp_fx.measure.damage` say how the loss of a group's own layers grows with every unit, from statistics alone.
They do not say what it means to the network: a quarter of an attention's energy may be worth a thousandth of the output, the same
of a residual stream a third. So each group is masked and compensated alone, at a few fractions, and the error of the output on
some samples is measured; between these fractions, the output's error is the curve times a factor that is interpolated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.criteria.scores import Scores
from stp_fx.errors import InputError
from stp_fx.ir.stamp import Stamp, stamp_of
from stp_fx.measure.calibration import arguments_of, batches, eval_twin
from stp_fx.measure.damage import damage_curves
from stp_fx.measure.statistics import Statistics
from stp_fx.progress import progress_of, stepped
from stp_fx.rewrite.compensation import Method, compensate
from stp_fx.rewrite.removal import mask

__all__ = ["NEEDS", "Damages", "Outputs", "measure_damages"]

NEEDS = ("covariance", "maps", "patches")
"""The statistics that the curves read, and least squares where damages are measured with it."""

_LEAST = 1e-12
"""Below this, an error of the output or of a layer is rounding; the factor between them is kept in bounds."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Damages:
    """``curves[group]``: float64 [units + 1], the error of the network's output, relative to its energy, when the group loses its
    first 0, 1, ... units in the order of the scores. ``stamp``: of the graph and weights measured."""

    curves: Mapping[str, np.ndarray]
    stamp: Stamp | None = dataclasses.field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Damages({len(self.curves)} groups)"


def measure_damages(
    gm: fx.GraphModule,
    scores: Scores,
    statistics: Statistics,
    calibration: Iterable[Any],
    *,
    method: Method | None = None,
    samples: int = 256,
    fractions: Sequence[float] = (0.25, 0.5, 0.75),
) -> Damages:
    """The damage curves of all groups that were scored; ``gm`` is only read.

    Args:
        scores: the units of the lowest scores are removed first.
        statistics: with covariances, collected on this graph.
        calibration: batches, of which the first are run until ``samples`` are read.
        method: how the consumers of what is masked are compensated; None for not at all.
        fractions: of a group, at which the output is measured, rising; none for the layers' own loss alone.

    Raises:
        InputError: statistics without covariances, no batch, or an output without a floating-point tensor.
    """
    ranks = [_ranks(values.numpy()) for values in scores.values]
    curves = damage_curves(gm, statistics, scores.groups, ranks)
    if fractions:
        output = Outputs.of_first(gm, calibration, samples)
        graph = analyze(gm)
        for k in stepped("measuring damages", range(len(curves)), progress_of(calibration)):
            group, rank = scores.groups[k], ranks[k]
            counts = sorted({min(max(1, round(each * group.size)), group.size - 1) for each in fractions} - {0})
            errors = [output.error(_without(gm, graph, group, rank < count, statistics, method)) for count in counts]
            curves[k] = _calibrated(curves[k], counts, errors)
    return Damages({group.name: curve for group, curve in zip(scores.groups, curves, strict=True)}, stamp_of(gm))


def _ranks(scores: np.ndarray) -> np.ndarray:
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return rank


def _calibrated(curve: np.ndarray, counts: Sequence[int], errors: Sequence[float]) -> np.ndarray:
    """``curve`` times the factor that gives ``errors`` at ``counts``, interpolated on a logarithmic scale; never falling."""
    if not counts:
        return curve
    shape = np.maximum(curve, _LEAST)
    shape[0] = 0.0
    factors = np.log(np.maximum(errors, _LEAST) / shape[list(counts)])
    return np.maximum.accumulate(shape * np.exp(np.interp(np.arange(len(curve)), counts, factors)))


def _without(
    gm: fx.GraphModule, graph: ChannelGraph, group: Group, first: np.ndarray, statistics: Statistics, method: Method | None
) -> fx.GraphModule:
    """``gm`` with the flagged units of one group masked, and their consumers compensated."""
    removed = np.zeros(graph.units, dtype=bool)
    removed[group.units[first]] = True
    plan = graph.plan_removing(removed)
    return mask(gm if method is None else compensate(gm, plan, statistics, method)[0], plan)


def _first(gm: fx.GraphModule, calibration: Iterable[Any] | None, samples: int) -> Iterator[tuple[Any, ...]]:
    """The arguments of the first batches, until they have so many samples; the last batch is not cut, since its tensors need not
    share a batch dimension."""
    seen = 0
    for batch in batches(gm, calibration, "measuring damages", show=False):
        arguments = arguments_of(gm, batch)
        yield arguments
        seen += next((len(each) for each in pytree.tree_leaves(arguments) if isinstance(each, torch.Tensor) and each.dim()), 1)
        if seen >= samples:
            return


class Outputs:
    """The outputs of the network as it is, and the error of another network's."""

    def __init__(self, gm: fx.GraphModule, arguments: Sequence[tuple[Any, ...]]) -> None:
        self._arguments = arguments
        self._whole = [self._of(gm, each) for each in arguments]
        kinds = list(zip(*self._whole, strict=True))
        if not kinds:
            raise InputError("the graph gives no floating-point tensor, so there is no error of its output to measure")
        self._energy = [_energy(each) for each in kinds]

    @classmethod
    def of_first(cls, gm: fx.GraphModule, calibration: Iterable[Any] | None, samples: int) -> Outputs:
        """For the first batches, until they have so many samples.

        Raises:
            InputError: no batch, or an output without a floating-point tensor.
        """
        return cls(gm, list(_first(gm, calibration, samples)))

    def error(self, gm: fx.GraphModule) -> float:
        """The squared error of every output tensor relative to its energy about the mean, averaged over the tensors."""
        total = [0.0] * len(self._energy)
        for arguments, whole in zip(self._arguments, self._whole, strict=True):
            for k, (found, expected) in enumerate(zip(self._of(gm, arguments), whole, strict=True)):
                total[k] += float((found - expected).square().sum(dtype=torch.float64))
        return float(np.mean([error / energy for error, energy in zip(total, self._energy, strict=True)]))

    @staticmethod
    def _of(gm: fx.GraphModule, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
        with torch.no_grad():
            leaves = pytree.tree_leaves(eval_twin(gm)(*arguments))
        return [each for each in leaves if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _energy(tensors: Sequence[torch.Tensor]) -> float:
    """The sum of squares about the mean over samples, where all have one shape; about zero else."""
    alike = len({each.shape[1:] for each in tensors}) == 1 and tensors[0].dim() > 0
    rows = torch.cat(list(tensors)) if alike else torch.cat([each.reshape(-1) for each in tensors])[None]
    rows = rows - rows.mean(0, dtype=torch.float64) if len(rows) > 1 else rows.double()
    return max(float(rows.square().sum()), 1e-300)
