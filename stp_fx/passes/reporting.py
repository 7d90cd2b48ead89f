"""The report of a selection, attached to the graph that its plan was applied to."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import fx

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.plan import PrunePlan
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.passes.artifacts import Artifacts
from stp_fx.report.run_report import RunReport

__all__ = ["CHANGES", "pinned_in_report", "reported", "with_compensation"]

CHANGES = "removing it changes the function (checked)"
"""The reason of a pin that no rule knows of: masked and removed graph have been run and differ."""


def reported(result: fx.GraphModule, artifacts: Artifacts, plan: PrunePlan, verb: str) -> fx.GraphModule:
    """``result`` with the report of the selection that made ``plan``, which is logged as well; a plan from elsewhere has none."""
    if artifacts.report is None or artifacts.plan != plan:
        return result
    artifacts.report.log(verb)
    return with_provenance(result, report=dataclasses.replace(artifacts.report, validation=provenance_of(result).validation))


def pinned_in_report(result: fx.GraphModule, graph: ChannelGraph, names: Collection[str]) -> fx.GraphModule:
    """``result`` with a report that says which groups of ``graph`` a check has pinned."""
    report = provenance_of(result).report
    axes = {member.axis.name for group in graph.groups if group.name in names for member in group.members}
    return with_provenance(
        result,
        report=dataclasses.replace(
            report,
            pinned={**report.pinned, CHANGES: len(axes)},
            notes=(*report.notes, f"pinned, since {CHANGES}: {', '.join(names)}"),
        ),
    )


def with_compensation(report: RunReport, method: str, by_group: Mapping[str, str]) -> RunReport:
    """``report`` with how the readers of each group were compensated."""
    groups = tuple(dataclasses.replace(g, compensation=by_group.get(g.name, g.compensation)) for g in report.groups)
    return dataclasses.replace(report, groups=groups, compensation=method)
