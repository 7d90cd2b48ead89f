"""From a plan to what lives: the plan's indices, checked against the coupling that the analysis found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from stp_fx.analysis.graph import ChannelGraph, alive_classes, removed_axes
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import PlanError
from stp_fx.ir.provenance import is_mask_buffer

__all__ = ["Cut", "alive_under", "plan_removing", "removed_units"]


class Cut(Protocol):
    """What a plan says: ``kept[name, dim]`` are the positions that stay, ``sizes[name, dim]`` how long the axis was."""

    @property
    def kept(self) -> Mapping[tuple[str, int], np.ndarray]: ...

    @property
    def sizes(self) -> Mapping[tuple[str, int], int]: ...


def alive_under(graph: ChannelGraph, plan: Cut, *, partial: bool = False) -> np.ndarray:
    """Which classes live under ``plan`` (bool, one per class).

    ``partial`` accepts a plan that does not speak of every coupled axis (a masked graph has gained mask buffers since).

    Raises:
        PlanError: unknown tensor, wrong size, a pinned position, or coupled axes that disagree; names the axis.
    """
    removed = removed_units(graph, plan)
    alive = alive_classes(graph, removed)
    found = removed_axes(graph, alive)
    for key, kept in plan.kept.items():
        actual = found.get(_canonical(graph, key))
        if actual is None or not np.array_equal(actual, kept):
            raise PlanError(_disagreement(graph, key, kept, actual))
    if not partial:
        spoken = {_canonical(graph, key) for key in plan.kept}
        missing = [key for key in found if key not in spoken]
        if missing:
            name, dim = missing[0]
            raise PlanError(f"the plan removes units that also shorten '{name}' dim {dim}, of which it does not speak")
    return alive


def removed_units(graph: ChannelGraph, plan: Cut) -> np.ndarray:
    """The units that ``plan`` removes (bool, one per unit): those whose every position is gone."""
    label = graph.solution.label
    axes = {(axis.tensor, axis.dim): axis.ids for axis in graph.found.axes}
    dead = np.zeros(graph.solution.count, dtype=bool)
    living = np.zeros(graph.solution.count, dtype=bool)
    for key, kept in plan.kept.items():
        ids = axes.get(_canonical(graph, key))
        if ids is None:
            raise PlanError(f"the plan shortens '{key[0]}' dim {key[1]}, which the graph does not have")
        if len(ids) != plan.sizes[key]:
            raise PlanError(f"'{key[0]}' dim {key[1]} has {len(ids)} positions, the plan was made for {plan.sizes[key]}")
        gone = np.ones(len(ids), dtype=bool)
        gone[kept] = False
        dead[label[ids[gone]]] = True
        living[label[ids[~gone]]] = True
        pinned = graph.solution.pinned[label[ids]] & gone
        if pinned.any():
            raise PlanError(f"the plan removes pinned position {int(np.flatnonzero(pinned)[0])} of '{key[0]}' dim {key[1]}")
    if (dead & living & ~graph.solution.derived).any():
        raise PlanError(_first_conflict(graph, plan, dead & living))
    seen = np.zeros(graph.solution.count, dtype=bool)  # classes of which some tensor tells whether they live
    for ids in axes.values():
        seen[label[ids]] = True
    for product in reversed(graph.solution.products):
        told, gone = seen[product.classes], dead[product.classes]
        for k, factor in enumerate(product.factors):
            others = tuple(j for j in range(gone.ndim) if j != k)
            dead[factor[(gone | ~told).all(axis=others) & told.any(axis=others)]] = True
            seen[factor[told.any(axis=others)]] = True
    return dead[graph.unit_class]


def plan_removing(graph: ChannelGraph, removed: np.ndarray) -> PrunePlan:
    """The plan that removes the flagged units (bool, one per unit) from every axis they touch; it leaves out mask buffers, so it
    also fits the graph without them."""
    kept = {axis: k for axis, k in removed_axes(graph, alive_classes(graph, removed)).items() if not is_mask_buffer(axis[0])}
    sizes = {(axis.tensor, axis.dim): axis.size for axis in graph.axes}
    return PrunePlan(kept, {key: sizes[key] for key in kept})


def _canonical(graph: ChannelGraph, key: tuple[str, int]) -> tuple[str, int]:
    return graph.found.aliases.get(key[0], key[0]), key[1]


def _first_conflict(graph: ChannelGraph, plan: Cut, both: np.ndarray) -> str:
    label = graph.solution.label
    axes = {(axis.tensor, axis.dim): axis.ids for axis in graph.found.axes}
    touching = [key for key in plan.kept if both[label[axes[_canonical(graph, key)]]].any()]
    names = " and ".join(f"'{name}' dim {dim}" for name, dim in touching[:2])
    return f"coupled axes disagree: {names} must keep the same units, and the plan keeps different ones"


def _disagreement(graph: ChannelGraph, key: tuple[str, int], kept: np.ndarray, actual: np.ndarray | None) -> str:
    size = "all" if actual is None else str(len(actual))
    return (
        f"'{key[0]}' dim {key[1]}: the plan keeps {len(kept)} positions, but what it says of the coupled axes keeps {size}; "
        "coupled axes must lose the same units (see ChannelGraph.explain)"
    )
