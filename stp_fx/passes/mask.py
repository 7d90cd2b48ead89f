"""MaskChannels: the architecture is kept, and consumers read zero from the units of a plan."""

from __future__ import annotations

import dataclasses

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.reporting import reported
from stp_fx.rewrite.removal import mask

__all__ = ["MaskChannels"]


@dataclasses.dataclass(frozen=True)
class MaskChannels(GraphPass):
    """Masks the units, and the blocks, of a plan in place of removing them.

    ``plan`` defaults to the one that :class:`SelectUnits` made in the same pipeline. In a graph that is masked already the units
    of both plans are masked.

    Raises:
        PlanError: the plan does not fit the graph.
        PassError: no plan.
    """

    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        plan = artifacts.planned("MaskChannels") if self.plan is None else self.plan
        return Outcome(reported(mask(gm, plan), artifacts, plan, "Mask"), True, Artifacts(plan=plan, report=artifacts.report))
