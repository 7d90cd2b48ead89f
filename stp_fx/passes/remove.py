"""RemoveChannels: a new, smaller GraphModule from a graph and a plan."""

from __future__ import annotations

import dataclasses

from torch import fx

from stp_fx.analysis.blocks import planned_blocks
from stp_fx.analysis.bypass import tensor_names
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_a
from stp_fx.errors import FunctionChangedError
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.ir.validation import Budget, Validate, together
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.remove_blocks import RemoveBlocks
from stp_fx.passes.reporting import reported
from stp_fx.rewrite.removal import remove
from stp_fx.rewrite.validate import validate_removal
from stp_fx.text import listed

__all__ = ["RemoveChannels"]


@dataclasses.dataclass(frozen=True)
class RemoveChannels(GraphPass):
    """Shortens parameters, buffers, gradients, module attributes and graph literals; the input graph is only read. Blocks of the
    plan are taken out first, as :class:`RemoveBlocks` does.

    ``plan`` defaults to the one that :class:`SelectUnits` made in the same pipeline. ``validate``: whether the result is run
    beside the masked graph, and compared: "auto", True, False, or a limit in seconds (see :func:`stp_fx.trace`).

    Raises:
        PlanError: the plan does not fit the graph.
        FunctionChangedError: the result computes something else than the masked graph; names the groups.
        RewriteError: the result would not have the promised shapes.
        PassError: no plan.
    """

    plan: PrunePlan | None = dataclasses.field(default=None, repr=False)
    validate: Validate = "auto"

    def __post_init__(self) -> None:
        Budget(self.validate)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        whole = artifacts.planned("RemoveChannels") if self.plan is None else self.plan
        plan = whole
        if is_a(whole, PrunePlan) and whole.blocks:
            names = tuple(block.name for block in planned_blocks(gm, whole.blocks))
            gm = RemoveBlocks(names, self.validate).run(gm, Artifacts()).graph_module
            plan = whole.without_blocks(tensor_names(gm))
        result = self._validated(gm, plan, remove(gm, plan))
        result = reported(result, artifacts, plan, "Prune")
        report = provenance_of(result).report or artifacts.report
        return Outcome(result, not whole.is_empty, Artifacts(report=report) if not whole.is_empty else artifacts)

    def _validated(self, gm: fx.GraphModule, plan: PrunePlan, result: fx.GraphModule) -> fx.GraphModule:
        """``result`` with what was checked in its provenance."""
        known = provenance_of(gm)
        spent = known.validation if known.plan is None else None
        budget = Budget(self.validate, spent, forwards=2 if spent is None else max(2, 10 - spent.forwards))
        if budget.off or plan.is_empty:
            return result
        found, guilty = validate_removal(gm, plan, result, budget)
        if guilty is not None:
            raise FunctionChangedError(
                f"removing {listed(guilty.groups, 6)} changes the function: {guilty.text} between the masked graph and the "
                "smaller one. Put these groups in `ignore`; validate=False skips the check",
                guilty.groups,
            )
        return with_provenance(result, validation=together(known.validation, found))

    def ensures(self, result: Outcome) -> None:
        """The rewrite has run every node of its result and compared every shape."""
        result.graph_module.graph.lint()
