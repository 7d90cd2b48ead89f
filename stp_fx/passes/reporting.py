"""The report of a selection, attached to the graph that its plan was applied to."""

from __future__ import annotations

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.ir.provenance import with_provenance
from stp_fx.passes.artifacts import Artifacts

__all__ = ["reported"]


def reported(result: fx.GraphModule, artifacts: Artifacts, plan: PrunePlan, verb: str) -> fx.GraphModule:
    """``result`` with the report of the selection that made ``plan``, which is logged as well; a plan from elsewhere has none."""
    if artifacts.report is None or artifacts.plan != plan:
        return result
    artifacts.report.log(verb)
    return with_provenance(result, report=artifacts.report)
