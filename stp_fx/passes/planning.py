"""What passes leave on a graph for each other: scores, a plan, a report; and which groups names stand for."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import fx, nn

from stp_fx.analysis.graph import ChannelGraph, alive_classes, removed_axes
from stp_fx.analysis.groups import Group
from stp_fx.errors import InputError, NothingToPruneError, PassError
from stp_fx.ir.provenance import provenance_of
from stp_fx.passes.collect import GRADIENTS, STATISTICS
from stp_fx.report.run_report import RunReport
from stp_fx.rewrite.masks import is_mask_buffer
from stp_fx.selection import PrunePlan

__all__ = [
    "PLAN",
    "REPORT",
    "SCORES",
    "carry_over",
    "groups_named",
    "is_partial",
    "log_run",
    "plan_for",
    "planned",
    "prunable_groups",
    "report_on",
    "reported",
]

SCORES, PLAN, REPORT = "scores", "plan", "report"


def plan_for(graph: ChannelGraph, removed: np.ndarray) -> PrunePlan:
    """The plan that takes the flagged units (bool, one per unit) out of every axis they touch; of masks it does not speak,
    so it also fits the graph without them."""
    kept = {axis: k for axis, k in removed_axes(graph, alive_classes(graph, removed)).items() if not is_mask_buffer(axis[0])}
    sizes = {(axis.tensor, axis.dim): axis.size for axis in graph.axes}
    return PrunePlan(kept, {key: sizes[key] for key in kept})


def is_partial(gm: fx.GraphModule) -> bool:
    """Whether plans need not speak of every axis: passes have added mask buffers or biases since the capture."""
    return provenance_of(gm).masked is not None or bool(provenance_of(gm).added)


def carry_over(
    source: fx.GraphModule,
    target: fx.GraphModule,
    plan: PrunePlan,
    compensation: str | None = None,
    by_group: Mapping[str, str] | None = None,
) -> None:
    """Leaves ``plan``, and what was collected on ``source``, on a copy of it that has other weights."""
    report = report_on(source, plan)
    caches = provenance_of(source).cache, provenance_of(target).cache
    if report is not None:
        marks = by_group or {}
        groups = tuple(dataclasses.replace(g, compensation=marks.get(g.name, g.compensation)) for g in report.groups)
        caches[1][REPORT] = dataclasses.replace(report, groups=groups, compensation=compensation or report.compensation)
    for key in (STATISTICS, GRADIENTS, SCORES):
        if key in caches[0]:
            caches[1][key] = caches[0][key]
    caches[1][PLAN] = plan


def planned(gm: fx.GraphModule) -> PrunePlan:
    """The plan that :class:`SelectUnits` left on the graph."""
    plan = provenance_of(gm).cache.get(PLAN)
    if plan is None:
        raise PassError("no plan on the graph: run SelectUnits before, or give this pass a plan")
    return plan


def reported(gm: fx.GraphModule) -> RunReport:
    """The report that :class:`SelectUnits` left on the graph beside its plan."""
    planned(gm)
    return provenance_of(gm).cache[REPORT]


def report_on(gm: fx.GraphModule, plan: PrunePlan) -> RunReport | None:
    """The report that :class:`SelectUnits` left on the graph, if it is of this plan."""
    cache = provenance_of(gm).cache
    return cache.get(REPORT) if cache.get(PLAN) == plan else None


def log_run(source: fx.GraphModule, result: fx.GraphModule, plan: PrunePlan, verb: str) -> None:
    """Logs the report of a selection that is being carried out, and keeps it on the result."""
    report = report_on(source, plan)
    if report is not None:
        report.log(verb)
        provenance_of(result).report = report


def prunable_groups(gm: fx.GraphModule, graph: ChannelGraph, ignore: Iterable[Any]) -> list[Group]:
    """Groups that touch nothing named in ``ignore``, and more than buffers: the rest of a table of positions that is read in
    part costs nothing, and longer inputs will read it.

    Raises:
        InputError: an entry of ``ignore`` that matches nothing.
        NothingToPruneError: no group is left; says why.
    """
    held: set[int] = set()
    for entry in [ignore] if isinstance(ignore, (str, nn.Module)) else ignore:
        held.update(group.index for group in groups_named(gm, graph, entry, "ignore"))
    worthwhile = [group for group in graph.groups if any(member.axis.role != "buffer" for member in group.members)]
    left = [group for group in worthwhile if group.index not in held]
    if not left:
        why = "everything is in `ignore`" if worthwhile else _why_nothing(graph)
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


def _why_nothing(graph: ChannelGraph) -> str:
    reasons = dict.fromkeys(f"{note.reason} ('{note.node}')" for note in graph.found.elements.pins if note.node)
    shown = list(reasons)[:3]
    return "; ".join(shown) if shown else "it has no parameters"
