"""MaskBlocks: the architecture is kept, and sums read zero from some of its residual branches."""

from __future__ import annotations

import dataclasses

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.on_blocks import OnBlocks
from stp_fx.rewrite.removal import mask

__all__ = ["MaskBlocks"]


@dataclasses.dataclass(frozen=True)
class MaskBlocks(OnBlocks):
    """Masks residual branches in place of removing them: a flag in the graph makes zero of what a block adds, in both modes.

    The graph computes what :class:`RemoveBlocks` would give, and no gradient reaches a masked block. ``UnmaskChannels`` takes all
    masks out. ``blocks`` are as for :class:`RemoveBlocks`; in a graph that is masked already, what either masks is masked.

    Raises:
        InputError: no such block, or one that cannot be removed; says why.
        PassError: no names and no plan.
    """

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        names = self.chosen(gm, artifacts)
        if not names:
            return Outcome(gm, False, artifacts)
        plan = PrunePlan({}, {}, names)
        return Outcome(mask(gm, plan), True, Artifacts(plan=plan, report=artifacts.report))
