"""MaskChannels: the training-time twin of removal. Same architecture, dead units read as zero by every consumer."""

from __future__ import annotations

import dataclasses

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.analysis.build import analyze
from stp_fx.analysis.liveness import alive_under
from stp_fx.ir.state import state_of
from stp_fx.passes.base import GraphPass
from stp_fx.passes.masks import add_masks
from stp_fx.passes.planning import is_partial, log_run, planned
from stp_fx.passes.slicing import copied
from stp_fx.selection.plan import PrunePlan

__all__ = ["MaskChannels"]


@dataclasses.dataclass(frozen=True)
class MaskChannels(GraphPass):
    """Makes the units of a plan dead in place of removing them; the input graph stays as it was.

    ``plan`` defaults to the one that :class:`SelectUnits` left on the graph. On a graph that is masked already, masks add up.

    Raises:
        PlanError: the plan does not fit the graph.
    """

    plan: PrunePlan | None = None

    def call(self, gm: fx.GraphModule) -> PassResult:
        plan = planned(gm) if self.plan is None else self.plan
        graph = analyze(gm)
        alive = alive_under(graph, plan, partial=is_partial(gm))
        result = copied(gm)
        made = add_masks(result, graph, alive)
        state = state_of(result)
        state.masked = plan if state.masked is None else _both(state.masked, plan)
        log_run(gm, result, plan, "Mask")
        return PassResult(result, made > 0)


def _both(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """What two plans for one graph keep together."""
    kept, sizes = dict(first.kept), dict(first.sizes)
    for key, indices in second.kept.items():
        sizes[key] = second.sizes[key]
        kept[key] = [k for k in indices if k in set(kept[key].tolist())] if key in kept else indices  # type: ignore[assignment]
    return PrunePlan(kept, sizes)
