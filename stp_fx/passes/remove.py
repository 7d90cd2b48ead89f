"""RemoveChannels: a new, smaller GraphModule from a graph and a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.analysis.build import analyze
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import RewriteError
from stp_fx.ir.provenance import provenance_of
from stp_fx.passes.base import GraphPass
from stp_fx.passes.planning import is_partial, log_run, planned
from stp_fx.rewrite.masks import drop_masks
from stp_fx.rewrite.refit import refit
from stp_fx.rewrite.slicing import shortened_copy

__all__ = ["RemoveChannels"]


@dataclasses.dataclass(frozen=True)
class RemoveChannels(GraphPass):
    """Slices parameters, buffers, gradients, module attributes and graph literals; the input graph stays as it was.

    ``plan`` defaults to the one that :class:`SelectUnits` left on the graph.

    Raises:
        PlanError: the plan does not fit the graph.
        RewriteError: the result would not have the promised shapes.
    """

    plan: PrunePlan | None = None

    def call(self, gm: fx.GraphModule) -> PassResult:
        plan = planned(gm) if self.plan is None else self.plan
        graph = analyze(gm)
        survivors = graph.survivors(plan, partial=is_partial(gm))
        result = shortened_copy(gm, graph, survivors)
        if not plan.is_empty:
            refit(result, graph, survivors)
            drop_masks(result, idle=True)
        before, state = provenance_of(gm).plan, provenance_of(result)
        own = _of_original(plan, state.added)
        state.plan = own if before is None else before.then(own)
        masked = None if state.masked is None else state.masked.after(plan)
        state.masked = None if masked is None or masked.is_empty else masked
        log_run(gm, result, plan, "Prune")
        return PassResult(result, not plan.is_empty)

    def ensures(self, result: PassResult) -> None:
        tensors = dict(result.graph_module.named_parameters(remove_duplicate=False))
        for (name, dim), kept in provenance_of(result.graph_module).plan.kept.items():
            tensor = tensors.get(name)
            if tensor is not None and tensor.shape[dim] != len(kept):
                raise RewriteError(f"'{name}' dim {dim} has {tensor.shape[dim]} positions left, the plan keeps {len(kept)}")


def _of_original(plan: PrunePlan, added: Collection[str]) -> PrunePlan:
    """The entries of a plan for tensors that the graph had when it was captured, so that it fits the original network."""
    kept = {key: indices for key, indices in plan.kept.items() if key[0] not in added}
    return PrunePlan(kept, {key: plan.sizes[key] for key in kept})
