"""ScoreUnits and SelectUnits: from weights to scores to a plan, left on the graph for the rewrites."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import cost_of, parameter_names
from stp_fx.analysis.graph import ChannelGraph, alive_classes, removed_axes
from stp_fx.analysis.groups import Group
from stp_fx.criteria import Criterion, ScoreContext, resolve, score_groups
from stp_fx.errors import InputError, NothingToPruneError, PassError
from stp_fx.ir.state import state_of
from stp_fx.passes.base import GraphPass
from stp_fx.passes.collect import GRADIENTS, STATISTICS, gradients_on, statistics_on
from stp_fx.selection import PrunePlan, carriers, select

__all__ = ["ScoreUnits", "SelectUnits", "groups_named", "plan_for", "planned", "prunable_groups"]

_SCORES, _PLAN = "scores", "plan"
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
        state_of(gm).cache[_SCORES] = (groups, scores)
        return PassResult(gm, False)


@dataclasses.dataclass(frozen=True)
class SelectUnits(GraphPass):
    """Turns the scores that :class:`ScoreUnits` left into a plan. Arguments as in :func:`stp_fx.prune_graph`.

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

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        if _SCORES not in state_of(gm).cache:
            raise PassError("SelectUnits needs scores: run ScoreUnits before it")

    def call(self, gm: fx.GraphModule) -> PassResult:
        graph = analyze(gm)
        groups, scores = state_of(gm).cache[_SCORES]
        ratios = _ratios_by_group(gm, graph, groups, self.ratios or {})
        exponents = _carrying(graph, groups, ratios, self.products)
        parameters = parameter_names(gm)

        def cost(removed: np.ndarray) -> float:
            return float(getattr(cost_of(graph, parameters, alive_classes(graph, removed)), self.target))

        removed = select(
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
            cost=cost if self.target in ("macs", "params") else None,
        )
        removed = _keep_a_position_everywhere(graph, groups, scores, removed)
        state_of(gm).cache[_PLAN] = plan_for(graph, removed)
        for group in groups:
            _log.debug("Prune %d/%d channels of %s", int(removed[group.units].sum()), group.size, group.name)
        return PassResult(gm, False)


def plan_for(graph: ChannelGraph, removed: np.ndarray) -> PrunePlan:
    """The plan that takes the flagged units (bool, one per unit) out of every axis they touch."""
    kept = removed_axes(graph, alive_classes(graph, removed))
    sizes = {(axis.tensor, axis.dim): axis.size for axis in graph.axes}
    return PrunePlan(kept, {key: sizes[key] for key in kept})


def is_partial(gm: fx.GraphModule) -> bool:
    """Whether plans need not speak of every axis: passes have added mask buffers or biases since the capture."""
    return state_of(gm).masked is not None or bool(state_of(gm).added)


def carry_over(source: fx.GraphModule, target: fx.GraphModule, plan: PrunePlan) -> None:
    """Leaves ``plan``, and what was collected on ``source``, on a copy of it that has other weights."""
    caches = state_of(source).cache, state_of(target).cache
    for key in (STATISTICS, GRADIENTS, _SCORES):
        if key in caches[0]:
            caches[1][key] = caches[0][key]
    caches[1][_PLAN] = plan


def planned(gm: fx.GraphModule) -> PrunePlan:
    """The plan that :class:`SelectUnits` left on the graph."""
    plan = state_of(gm).cache.get(_PLAN)
    if plan is None:
        raise PassError("no plan on the graph: run SelectUnits before, or give this pass a plan")
    return plan


def prunable_groups(gm: fx.GraphModule, graph: ChannelGraph, ignore: Iterable[Any]) -> list[Group]:
    """Groups that touch nothing named in ``ignore``.

    Raises:
        InputError: an entry of ``ignore`` that matches nothing.
        NothingToPruneError: no group is left; says why.
    """
    held: set[int] = set()
    for entry in [ignore] if isinstance(ignore, (str, nn.Module)) else ignore:
        held.update(group.index for group in groups_named(gm, graph, entry, "ignore"))
    left = [group for group in graph.groups if group.index not in held]
    if not left:
        why = "everything is in `ignore`" if graph.groups else _why_nothing(graph)
        raise NothingToPruneError(f"the graph has no channel that can be removed: {why}")
    return left


def groups_named(gm: fx.GraphModule, graph: ChannelGraph, entry: Any, argument: str) -> list[Group]:
    """Groups that touch a parameter, buffer or module (by name or object), one axis (``"conv1.weight:0"``), or so named."""
    name = _module_name(gm, entry, argument) if isinstance(entry, nn.Module) else entry
    if not isinstance(name, str):
        raise InputError(f"`{argument}` holds {entry!r}: give parameter names, module names or modules of the traced graph")
    by_group = [group for group in graph.groups if group.name == name]
    if by_group:
        return by_group
    known = {axis.tensor for axis in graph.axes} | set(graph.found.aliases)
    modules = {m for m, _ in gm.named_modules(remove_duplicate=False)}
    axis_names = {axis.name for axis in graph.axes}
    prefix = name + "."
    if name in axis_names:
        return [g for g in graph.groups if any(m.axis.name == name for m in g.members)]
    if name not in known and name not in modules and not any(k.startswith(prefix) for k in known):
        close = difflib.get_close_matches(name, sorted(known | modules), n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(f"`{argument}` names {name!r}, which the graph does not have{hint}")
    canonical = {graph.found.aliases.get(k, k) for k in known if k == name or k.startswith(prefix) or name == ""}
    return [g for g in graph.groups if any(m.axis.tensor in canonical for m in g.members)]


def _module_name(gm: fx.GraphModule, module: nn.Module, argument: str) -> str:
    """The name of a module in the graph: the module itself, or one that shares its parameters."""
    theirs = {id(t) for t in (*module.parameters(), *module.buffers())}
    for name, candidate in gm.named_modules(remove_duplicate=False):
        if candidate is module:
            return name
    for name, candidate in gm.named_modules(remove_duplicate=False):
        ours = {id(t) for t in (*candidate.parameters(), *candidate.buffers())}
        if theirs and ours == theirs:
            return name
    raise InputError(f"`{argument}` holds a {type(module).__name__} that is not part of the graph; name it instead")


def _ratios_by_group(
    gm: fx.GraphModule, graph: ChannelGraph, groups: Sequence[Group], ratios: Mapping[str, float]
) -> dict[int, float]:
    """A named layer's ratio is that of its outputs' groups; that of a tensor without outputs (a norm's), of all it touches."""
    allowed = {group.index for group in groups}
    result: dict[int, float] = {}
    for name, ratio in ratios.items():
        touching = [g for g in groups_named(gm, graph, name, "ratios") if g.index in allowed]
        if any(_is_output_of(axis, name) for axis in graph.axes):
            touching = [g for g in touching if g.name == name or any(_is_output_of(m.axis, name) for m in g.members)]
        if not touching:
            raise InputError(f"`ratios` names {name!r}, but none of its channels can be removed: {_why_name(graph, name)}")
        result.update({group.index: ratio for group in touching})
    return result


def _is_output_of(axis: Any, name: str) -> bool:
    named = axis.tensor == name or axis.name == name or axis.tensor.startswith(name + ".")
    return named and axis.side in ("out", "both")


def _why_name(graph: ChannelGraph, name: str) -> str:
    axes = [a for a in graph.axes if a.tensor == name or a.name == name or a.tensor.startswith(name + ".")]
    return graph.explain(axes[0].name) if axes else "it has no parameters"


def _why_nothing(graph: ChannelGraph) -> str:
    reasons = dict.fromkeys(f"{note.reason} ('{note.node}')" for note in graph.found.elements.pins if note.node)
    shown = list(reasons)[:3]
    return "; ".join(shown) if shown else "it has no parameters"


def _carrying(graph: ChannelGraph, groups: Sequence[Group], ratios: Mapping[int, float], option: str) -> dict[int, int]:
    """Which groups lose units; a group with a ratio of its own always does."""
    result = carriers(groups, graph.products, option)
    result.update({index: max(result.get(index, 0), 1) for index in ratios})
    return result


def _keep_a_position_everywhere(
    graph: ChannelGraph, groups: Sequence[Group], scores: Sequence[torch.Tensor], removed: np.ndarray
) -> np.ndarray:
    """No piece of a tensor may lose all its positions: its best unit stays."""
    if not removed.any():
        return removed
    score = np.full(graph.units, -np.inf)
    for group, values in zip(groups, scores, strict=True):
        score[group.units] = values.numpy()
    unit_of = np.full(graph.solution.count, -1, dtype=np.int64)
    unit_of[graph.unit_class] = np.arange(graph.units)
    removed = removed.copy()
    seen: set[int] = set()
    for ids in graph.found.pieces():
        if id(ids) in seen:
            continue
        seen.add(id(ids))
        units = unit_of[graph.solution.label[ids]]
        if (units >= 0).all() and removed[units].all():
            removed[units[np.argmax(score[units])]] = False
    return removed
