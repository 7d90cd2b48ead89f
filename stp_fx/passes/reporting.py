"""The report of a selection, attached to the graph that its plan was applied to."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping

from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.plan import PrunePlan
from stp_fx.analysis.sites import find_sites
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.report.run_report import RunReport
from stp_fx.rewrite.sequential import Repaired

__all__ = ["CHANGES", "pinned_in_report", "repaired", "reported", "with_compensation"]

_log = logging.getLogger(__name__)

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


def repaired(gm: fx.GraphModule, artifacts: Artifacts, plan: PrunePlan, method: str, done: Repaired) -> Outcome:
    """The outcome of a pass that has repaired ``gm`` by ``method``. Layers that it left alone are logged, with the reasons."""
    for node, reason in done.left_alone.items():
        _log.info("%s is not repaired (%s): %s", node, method, reason)
    if done.graph_module is gm:
        return Outcome(gm, False, artifacts)
    report = artifacts.report and with_compensation(artifacts.report, method, _by_group(gm, frozenset(done.layers), method))
    return Outcome(done.graph_module, True, artifacts.carried_to(done.graph_module).with_(plan=plan, report=report))


def _by_group(gm: fx.GraphModule, layers: frozenset[str], method: str) -> dict[str, str]:
    """The groups whose consumers have been repaired."""
    found: dict[str, str] = {}
    for group in analyze(gm).groups:
        readers = [member.site.reader in layers for member in find_sites(gm).of(group) if member.site.weights]
        if any(readers):
            found[group.name] = method if all(readers) else f"{method} (in part)"
    return found


def with_compensation(report: RunReport, method: str, by_group: Mapping[str, str]) -> RunReport:
    """``report`` with how the consumers of each group were compensated."""
    groups = tuple(dataclasses.replace(g, compensation=by_group.get(g.name, g.compensation)) for g in report.groups)
    return dataclasses.replace(report, groups=groups, compensation=method)
