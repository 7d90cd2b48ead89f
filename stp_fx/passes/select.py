"""ScoreUnits and SelectUnits: from weights to scores to a plan, left on the graph for the rewrites."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import cost_of, parameter_names
from stp_fx.analysis.graph import ChannelGraph, alive_classes
from stp_fx.analysis.groups import Group
from stp_fx.analysis.isomorphism import isomorphism_classes
from stp_fx.analysis.liveness import removed_units
from stp_fx.criteria import Criterion, ScoreContext, resolve, score_groups
from stp_fx.errors import InputError, PassError
from stp_fx.ir.provenance import provenance_of
from stp_fx.passes.base import GraphPass
from stp_fx.passes.collect import gradients_on, statistics_on
from stp_fx.passes.planning import PLAN, REPORT, SCORES, groups_named, plan_for, prunable_groups
from stp_fx.report.run_report import run_report
from stp_fx.selection import carriers, merge_ratios, pieces_of, select
from stp_fx.selection.latency_model import latency_model

__all__ = ["ScoreUnits", "SelectUnits"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ScoreUnits(GraphPass):
    """Scores every unit that may go with ``criterion`` (a name or a Criterion); ``ignore`` names what must stay whole.

    Raises:
        CriterionError: weights that cannot be scored.
        NothingToPruneError: the graph has no unit that may go.
    """

    criterion: str | Criterion = "magnitude"
    ignore: tuple[Any, ...] = ()
    seed: int = 0

    def call(self, gm: fx.GraphModule) -> PassResult:
        criterion = resolve(self.criterion)
        graph = analyze(gm)
        groups = prunable_groups(gm, graph, self.ignore)
        tensors = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
        with torch.no_grad():
            context = ScoreContext(tensors, self.seed, gm, statistics_on(gm), gradients_on(gm))
            scores = score_groups(groups, criterion, context)
        if provenance_of(gm).masked is not None:
            scores = _dead_first(graph, groups, scores, removed_units(graph, provenance_of(gm).masked))
        provenance_of(gm).cache[SCORES] = (groups, scores)
        return PassResult(gm, False)


@dataclasses.dataclass(frozen=True)
class SelectUnits(GraphPass):
    """Turns the scores that :class:`ScoreUnits` left into a plan. Arguments as in :func:`stp_fx.prune_graph`.

    ``whole`` maps names of groups to the units that they had before an earlier removal: with the target "channels" in the
    local scope, and in ``ratios``, a ratio is meant of those.

    Raises:
        InputError: an argument out of range, a name in ``ratios`` that matches nothing, a target that cannot be met.
    """

    ratio: float = 0.5
    scope: str = "local"
    target: str = "channels"
    ratios: Mapping[str, float] | None = None
    round_to: int = 1
    max_ratio: float = 1.0
    products: str = "auto"
    whole: Mapping[str, int] | None = None

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        if SCORES not in provenance_of(gm).cache:
            raise PassError("SelectUnits needs scores: run ScoreUnits before it")

    def call(self, gm: fx.GraphModule) -> PassResult:
        graph = analyze(gm)
        groups, scores = provenance_of(gm).cache[SCORES]
        ratios = _ratios_by_group(gm, graph, groups, self.ratios or {})
        exponents = _carrying(graph, groups, ratios, self.products)
        chosen = select(
            groups,
            scores,
            total=graph.units,
            ratio=self.ratio,
            scope=self.scope,
            target=self.target,
            ratios=ratios,
            exponents=exponents,
            max_ratio=self.max_ratio,
            round_to=self.round_to,
            cost=self._cost(gm, graph),
            classes=isomorphism_classes(groups, graph.found.shapes),
            whole=None if self.whole is None else {g.index: self.whole[g.name] for g in groups if g.name in self.whole},
            pieces=pieces_of(graph),
        )
        provenance_of(gm).cache[PLAN] = plan_for(graph, chosen.removed)
        provenance_of(gm).cache[REPORT] = run_report(gm, graph, groups, scores, chosen.removed, chosen.notes)
        return PassResult(gm, False)

    def _cost(self, gm: fx.GraphModule, graph: ChannelGraph) -> Callable[[np.ndarray], float] | None:
        """What the target counts, as a function of the removed units (bool, one per unit)."""
        if self.target == "latency":
            model = latency_model(gm)
            return lambda removed: model.predict(graph, alive_classes(graph, removed))
        if self.target not in ("macs", "params"):
            return None
        parameters = parameter_names(gm)
        return lambda removed: float(getattr(cost_of(graph, parameters, alive_classes(graph, removed)), self.target))


def _dead_first(
    graph: ChannelGraph, groups: Sequence[Group], scores: Sequence[torch.Tensor], dead: np.ndarray
) -> list[torch.Tensor]:
    """What is masked stays so: below every other unit, whatever its weights are by now."""
    lowest = min((float(each.min()) for each in scores if len(each)), default=0.0) - 1.0
    return [
        torch.where(torch.from_numpy(dead[group.units]), torch.full_like(each, lowest), each)
        for group, each in zip(groups, scores, strict=True)
    ]


def _ratios_by_group(
    gm: fx.GraphModule, graph: ChannelGraph, groups: Sequence[Group], ratios: Mapping[str, float]
) -> dict[int, float]:
    """A named layer's ratio is that of its outputs' groups; that of a tensor without outputs (a norm's), of all it touches."""
    allowed = {group.index for group in groups}
    named: list[tuple[str, float, Sequence[Group]]] = []
    for name, ratio in ratios.items():
        touching = [g for g in groups_named(gm, graph, name, "ratios") if g.index in allowed]
        if any(_is_output_of(axis, name) for axis in graph.axes):
            touching = [g for g in touching if g.name == name or any(_is_output_of(m.axis, name) for m in g.members)]
        if not touching:
            raise InputError(f"`ratios` names {name!r}, but none of its channels can be removed: {_why_name(graph, name)}")
        named.append((name, ratio, touching))
    return merge_ratios(named)


def _is_output_of(axis: Any, name: str) -> bool:
    named = axis.tensor == name or axis.name == name or axis.tensor.startswith(name + ".")
    return named and axis.side in ("out", "both")


def _why_name(graph: ChannelGraph, name: str) -> str:
    axes = [a for a in graph.axes if a.tensor == name or a.name == name or a.tensor.startswith(name + ".")]
    return graph.explain(axes[0].name) if axes else "it has no parameters"


def _carrying(graph: ChannelGraph, groups: Sequence[Group], ratios: Mapping[int, float], option: str) -> dict[int, int]:
    """Which groups lose units; a group with a ratio of its own always does."""
    result = carriers(groups, graph.products, option)
    result.update({index: max(result.get(index, 0), 1) for index in ratios})
    return result
