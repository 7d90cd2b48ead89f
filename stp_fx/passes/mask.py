"""MaskChannels: the training-time twin of removal. Same architecture, dead units read as zero by every consumer."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.analysis.build import analyze
from stp_fx.analysis.plan import PrunePlan
from stp_fx.ir.provenance import provenance_of
from stp_fx.passes.base import GraphPass
from stp_fx.passes.planning import is_partial, log_run, planned
from stp_fx.rewrite.masks import add_masks, drop_masks
from stp_fx.rewrite.slicing import copied

__all__ = ["MaskChannels"]


@dataclasses.dataclass(frozen=True)
class MaskChannels(GraphPass):
    """Makes the units of a plan dead in place of removing them; the input graph stays as it was.

    ``plan`` defaults to the one that :class:`SelectUnits` left on the graph. A graph that is masked already has
    the units of both plans dead.

    Raises:
        PlanError: the plan does not fit the graph.
    """

    plan: PrunePlan | None = None

    def call(self, gm: fx.GraphModule) -> PassResult:
        plan = planned(gm) if self.plan is None else self.plan
        result = copied(gm)
        state = provenance_of(result)
        if state.masked is None:
            together = plan
        else:
            analyze(gm).survivors(plan, partial=True)  # a plan that does not fit is refused by its own names
            together = _both(state.masked, plan)
            drop_masks(result)
        graph = analyze(result)
        made = add_masks(result, graph, graph.survivors(together, partial=is_partial(gm)))
        state.masked = together
        log_run(gm, result, plan, "Mask")
        return PassResult(result, made > 0)


def _both(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """What two plans for one graph keep together."""
    kept, sizes = dict(first.kept), dict(first.sizes)
    for key, indices in second.kept.items():
        sizes[key] = second.sizes[key]
        kept[key] = np.intersect1d(kept[key], indices) if key in kept else indices
    return PrunePlan(kept, sizes)
