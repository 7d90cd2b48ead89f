"""What passes leave on a graph for each other: scores, a plan, a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from stp_fx.errors import PassError
from stp_fx.ir.provenance import provenance_of
from stp_fx.passes.collect import GRADIENTS, STATISTICS
from stp_fx.report.run_report import RunReport
from stp_fx.selection import PrunePlan

__all__ = [
    "PLAN",
    "REPORT",
    "SCORES",
    "carry_over",
    "is_partial",
    "log_run",
    "planned",
    "report_on",
    "reported",
]

SCORES, PLAN, REPORT = "scores", "plan", "report"


def is_partial(gm: fx.GraphModule) -> bool:
    """Whether a plan may lack entries for some axes: passes have added mask buffers or biases since the capture."""
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
