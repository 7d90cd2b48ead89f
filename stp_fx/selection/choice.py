"""``select``: from scores to a plan, under a :class:`Selection`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.analysis.isomorphism import isomorphism_classes
from stp_fx.analysis.names import outputs_named, prunable_groups
from stp_fx.analysis.plan import PrunePlan
from stp_fx.criteria.scores import Scores
from stp_fx.errors import InputError, NothingToPruneError
from stp_fx.ir.stamp import check_stamp
from stp_fx.selection.damage import Damages
from stp_fx.selection.latency_model import latency_model
from stp_fx.selection.memory_model import cached_values, memory_model
from stp_fx.selection.products import carriers
from stp_fx.selection.ratios import merge_ratios
from stp_fx.selection.selection import DamageFunction, Selection
from stp_fx.selection.target import select_units

__all__ = ["Choice", "check_names", "choose", "latency_cost", "select"]

CostOf = Callable[[np.ndarray], float]
"""The cost (MACs, parameters, seconds or bytes) of the network without the units flagged in a bool array."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Choice:
    """``removed`` (bool, one per unit of the graph) and the plan that removes them; ``damage``: the total damage that an
    allocation foresees of it."""

    plan: PrunePlan
    removed: np.ndarray
    notes: tuple[str, ...] = ()
    damage: float | None = None

    def __repr__(self) -> str:
        return f"Choice({int(self.removed.sum())} of {len(self.removed)} units removed; {len(self.notes)} notes)"


def select(
    gm: fx.GraphModule,
    scores: Scores,
    selection: Selection,
    *,
    cost: CostOf | None = None,
    whole: Mapping[str, int] | None = None,
    damages: Damages | None = None,
) -> PrunePlan:
    """The plan that ``selection`` makes of ``scores``; ``gm`` is only read. Arguments as for :func:`choose`."""
    return choose(gm, scores, selection, cost=cost, whole=whole, damages=damages).plan


def choose(
    gm: fx.GraphModule,
    scores: Scores,
    selection: Selection,
    *,
    cost: CostOf | None = None,
    whole: Mapping[str, int] | None = None,
    damages: Damages | None = None,
) -> Choice:
    """The units that ``selection`` removes, with notes of what its constraints held back.

    Args:
        scores: what :func:`stp_fx.criteria.scores.score` gave for this graph.
        cost: the cost that a target other than "channels" counts, of the network without the flagged units; by default exact
            MACs and parameters, and latency as measured now.
        whole: by group name, the units that the group had before an earlier removal: with the target "channels" in the local
            scope, and in ``ratios``, a ratio is a fraction of those.
        damages: for ``allocation="optimal"``, what :func:`stp_fx.selection.damage.measure_damages` gave for this graph and these
            scores.

    Raises:
        InputError: a name that matches nothing, scores or damages of another graph or of other weights, or no damages.
        TargetError: a cost out of reach under the constraints.
        NothingToPruneError: no group is left.
    """
    check_stamp(gm, scores.stamp, "the scores", "score this graph again")
    graph = analyze(gm)
    groups, values = _without_ignored(gm, graph, scores, selection)
    ratios = ratios_by_group(gm, graph, groups, selection.ratios or {})
    groups, values = _without_unnamed_experts(groups, values, ratios)
    products = "outer" if selection.uniform and selection.products == "auto" else selection.products
    exponents = carriers(groups, graph.products, products)
    exponents.update({index: max(exponents.get(index, 0), 1) for index in ratios})  # a group with a ratio of its own is cut
    selected = select_units(
        groups,
        values,
        total=graph.units,
        ratio=selection.ratio,
        scope=selection.scope,
        target=selection.target,
        ratios=ratios,
        exponents=exponents,
        max_ratio=selection.max_ratio,
        round_to=selection.round_to,
        cost=cost or _cost(gm, graph, selection),
        classes=isomorphism_classes(groups, graph.shapes),
        whole=None if whole is None else {g.index: whole[g.name] for g in groups if g.name in whole},
        pieces=graph.pieces(),
        uniform=selection.uniform,
        damages=_damages(gm, groups, selection, damages),
    )
    return Choice(graph.plan_removing(selected.removed), selected.removed, selected.notes, selected.damage)


def _damages(
    gm: fx.GraphModule, groups: Sequence[Group], selection: Selection, measured: Damages | None
) -> list[np.ndarray | DamageFunction] | None:
    """One curve or function a group; None where the scope says how much is removed.

    Raises:
        InputError: curves are needed, and none were measured, or not for these groups.
    """
    if callable(selection.allocation):
        return [selection.allocation for _ in groups]
    if selection.allocation == "scope":
        return None
    if measured is None:
        raise InputError("allocation='optimal' needs damages: run MeasureDamage between ScoreUnits and SelectUnits")
    check_stamp(gm, measured.stamp, "the damages", "measure them again on this graph")
    missing = [group.name for group in groups if group.name not in measured.curves]
    if missing:
        raise InputError(f"the damages have no curve for group {missing[0]!r}: measure them with these scores")
    return [measured.curves[group.name] for group in groups]


def check_names(gm: fx.GraphModule, selection: Selection) -> None:
    """Refuses names in ``ignore`` and ``ratios`` that match nothing, and a cache that nothing keeps, before anything is measured.

    Raises:
        InputError: the name, with close ones; or no attention keeps keys and values.
        NothingToPruneError: nothing is left that may be removed.
    """
    graph = analyze(gm)
    if selection.cache_tokens:
        cached_values(gm)
    ratios_by_group(gm, graph, prunable_groups(gm, graph, selection.ignore), selection.ratios or {})


def _without_ignored(
    gm: fx.GraphModule, graph: ChannelGraph, scores: Scores, selection: Selection
) -> tuple[list[Group], list[torch.Tensor]]:
    if not selection.ignore:
        return list(scores.groups), list(scores.values)
    allowed = {group.index for group in prunable_groups(gm, graph, selection.ignore)}
    pairs = [(g, v) for g, v in zip(scores.groups, scores.values, strict=True) if g.index in allowed]
    if not pairs:
        raise NothingToPruneError("every group that was scored is in `ignore`, so nothing may be removed")
    return [group for group, _ in pairs], [value for _, value in pairs]


def _without_unnamed_experts(
    groups: Sequence[Group], values: Sequence[torch.Tensor], ratios: Mapping[int, float]
) -> tuple[list[Group], list[torch.Tensor]]:
    """Whole experts are removed only at a ratio of their own."""
    pairs = [(g, v) for g, v in zip(groups, values, strict=True) if not g.chosen or g.index in ratios]
    if not pairs:
        raise NothingToPruneError("only whole experts can be removed here, and they need a ratio: name their router in `ratios`")
    return [group for group, _ in pairs], [value for _, value in pairs]


def _cost(gm: fx.GraphModule, graph: ChannelGraph, selection: Selection) -> CostOf | None:
    target = selection.target
    if target == "latency":
        return latency_cost(gm)
    if target == "memory":
        memory = memory_model(gm, cache_tokens=selection.cache_tokens, cache_batch=selection.cache_batch)
        return lambda removed: memory.predict(graph.survivors_without(removed))
    if target not in ("macs", "params"):
        return None
    return lambda removed: float(getattr(graph.survivors_without(removed), target))


def latency_cost(gm: fx.GraphModule) -> CostOf:
    """Predicted seconds of the network without the flagged units, from measurements taken now."""
    graph, model = analyze(gm), latency_model(gm)
    return lambda removed: model.predict(graph.survivors_without(removed))


def ratios_by_group(
    gm: fx.GraphModule, graph: ChannelGraph, groups: Sequence[Group], ratios: Mapping[Any, float]
) -> dict[int, float]:
    """By group index. A named layer's ratio is that of its outputs' groups; that of a tensor without outputs (a norm's), of all
    it touches. Whole experts are meant by the name of their router, of their group or of an axis of theirs alone, and never by a
    name that stands for other channels as well.

    Raises:
        InputError: a name that matches nothing, or nothing that may be removed; two ratios for one group.
    """
    allowed = {group.index for group in groups}
    named: list[tuple[str, float, Sequence[Group]]] = []
    for name, ratio in ratios.items():
        touching = [g for g in outputs_named(gm, graph, name, "ratios") if g.index in allowed]
        if not touching and any(group.chosen for group in outputs_named(gm, graph, name, "ratios")):
            raise InputError(
                f"`ratios` names experts by {_shown(name)}, but they are in `ignore`, or "
                "the criterion cannot score them (its notes say why): take another, such as 'magnitude'"
            )
        if not touching:
            raise InputError(f"`ratios` names {_shown(name)}, but none of its channels can be removed: {_why(graph, name)}")
        others = [group for group in touching if not group.chosen]
        touching = others or touching  # experts are meant by a name that stands for nothing else, as their router's
        named.append((name if isinstance(name, str) else f"a {type(name).__name__}", ratio, touching))
    return merge_ratios(named)


def _shown(name: Any) -> str:
    return repr(name) if isinstance(name, str) else f"a {type(name).__name__}"


def _why(graph: ChannelGraph, name: Any) -> str:
    axes = [a for a in graph.axes if isinstance(name, str) and (name in (a.tensor, a.name) or a.tensor.startswith(f"{name}."))]
    return graph.explain(axes[0].name) if axes else "see ChannelGraph.explain()"
