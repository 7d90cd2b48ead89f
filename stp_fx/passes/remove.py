"""RemoveChannels: a new, smaller GraphModule from a graph and a plan."""

from __future__ import annotations

import dataclasses

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.reporting import reported
from stp_fx.rewrite.removal import remove

__all__ = ["RemoveChannels"]


@dataclasses.dataclass(frozen=True)
class RemoveChannels(GraphPass):
    """Shortens parameters, buffers, gradients, module attributes and graph literals; the input graph is only read.

    ``plan`` defaults to the one that :class:`SelectUnits` made in the same pipeline.

    Raises:
        PlanError: the plan does not fit the graph.
        RewriteError: the result would not have the promised shapes.
        PassError: no plan.
    """

    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        plan = artifacts.planned("RemoveChannels") if self.plan is None else self.plan
        result = reported(remove(gm, plan), artifacts, plan, "Prune")
        return Outcome(result, not plan.is_empty, Artifacts(report=artifacts.report) if not plan.is_empty else artifacts)

    def ensures(self, result: Outcome) -> None:
        """The rewrite has run every node of its result and compared every shape."""
        result.graph_module.graph.lint()
