"""``score``: the scores of every unit that may be removed, as one value."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.analysis.names import prunable_groups
from stp_fx.checks import check_seed, is_a
from stp_fx.criteria.base import Criterion, ScoreContext, resolve, score_groups
from stp_fx.errors import CriterionError, InputError
from stp_fx.ir.provenance import provenance_of
from stp_fx.ir.stamp import Stamp, check_stamp, stamp_of
from stp_fx.measure.measured import Measured
from stp_fx.typed import from_numpy

__all__ = ["Scores", "score"]

_log = logging.getLogger("stp_fx.criteria")


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """``values[k]``: float64 [units], one score a unit of ``groups[k]``, higher for more important. ``stamp``: of the graph and
    the weights that were scored. ``notes``: what the criterion had to say, for the report."""

    groups: tuple[Group, ...]
    values: tuple[torch.Tensor, ...]
    stamp: Stamp | None = dataclasses.field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Scores({sum(group.size for group in self.groups):,} units of {len(self.groups)} groups)"


def score(
    gm: fx.GraphModule,
    criterion: str | Criterion | Callable[[Group, ScoreContext], torch.Tensor] = "magnitude",
    measured: Measured | None = None,
    *,
    ignore: Any = (),
    seed: int = 0,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Scores:
    """Scores every unit that may be removed with ``criterion`` (a name or a Criterion); ``gm`` is only read.

    Units that are masked score below all others, so that a plan for a masked graph removes them first.

    Args:
        measured: what :func:`stp_fx.measure.measured.measure` gave for this graph, for criteria that read data.
        ignore: parameters, modules or groups whose channels are kept; they are not scored.
        seed: for random criteria.
        tensors: what parameters and buffers hold, by all of their names; None: those of ``gm``, which may otherwise be on the
            meta device.

    Raises:
        InputError: a name that matches nothing, or measurements of other weights.
        CriterionError: weights that cannot be scored.
        NothingToPruneError: the graph has no unit that may be removed.
    """
    chosen = resolve(criterion)
    if measured is not None and not is_a(measured, Measured):
        raise InputError(f"`measured` is a {type(measured).__name__}; give what stp_fx.measure.measured.measure returned")
    check_seed(seed)
    known = measured or Measured()
    for each, what in ((known.statistics, "the statistics"), (known.gradients, "the gradients")):
        if each is not None:
            check_stamp(gm, each.stamp, what, "collect them again on this graph")
    graph = analyze(gm)
    groups = prunable_groups(gm, graph, ignore)
    if tensors is None:
        tensors = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        context = ScoreContext(tensors, seed, gm, known.statistics, known.gradients)
        groups, values = _channels_then_experts(groups, chosen, context)
    masked = provenance_of(gm).masked
    if masked is not None:
        values = _masked_first(graph, groups, values, ~graph.survivors(masked, partial=True).units)
    for note in context.notes:
        _log.info("%s", note)
    return Scores(tuple(groups), tuple(values), stamp_of(gm), tuple(context.notes))


def _channels_then_experts(
    groups: list[Group], criterion: Any, context: ScoreContext
) -> tuple[list[Group], Sequence[torch.Tensor]]:
    """Scores of the groups in their order. Whole experts are scored apart: they are removed only at a ratio of their own, so they
    change no score of other groups, and a criterion that cannot score them says so in a note and leaves them out."""
    experts = [group for group in groups if group.chosen]
    if not experts:
        return groups, score_groups(groups, criterion, context)
    channels = [group for group in groups if not group.chosen]
    found: dict[int, torch.Tensor] = {}
    if channels:
        found.update(zip((g.index for g in channels), score_groups(channels, criterion, context), strict=True))
    for group in experts:
        apart = ScoreContext(context.tensors, context.seed, context.module, context.statistics, context.gradients)
        try:
            (found[group.index],) = score_groups([group], criterion, apart)
        except CriterionError as error:
            if not channels:
                raise
            context.note(f"the experts of group '{group.name}' have no scores: {error}")
    left = [group for group in groups if group.index in found]
    return left, [found[group.index] for group in left]


def _masked_first(
    graph: ChannelGraph, groups: Sequence[Group], scores: Sequence[torch.Tensor], masked: np.ndarray
) -> list[torch.Tensor]:
    """Masked units score below every other unit, whatever their weights are by now, so they are removed first."""
    lowest = min((float(each.min()) for each in scores if len(each)), default=0.0) - 1.0
    return [
        torch.where(from_numpy(masked[group.units]), torch.full_like(each, lowest), each)
        for group, each in zip(groups, scores, strict=True)
    ]
