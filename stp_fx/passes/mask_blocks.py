"""MaskBlocks: the architecture is kept, and sums read zero from some of its residual branches."""

from __future__ import annotations

import dataclasses

from torch import fx

from stp_fx.analysis.blocks import blocks_named
from stp_fx.analysis.plan import PrunePlan
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.passes.remove_blocks import chosen_blocks, names_of_blocks
from stp_fx.rewrite.removal import mask

__all__ = ["MaskBlocks"]


@dataclasses.dataclass(frozen=True)
class MaskBlocks(GraphPass):
    """Masks residual branches in place of removing them: a flag in the graph makes zero of what a block adds, in both modes.

    The graph computes what :class:`RemoveBlocks` would give, and no gradient reaches a masked block. ``UnmaskChannels`` takes all
    masks out. ``blocks`` are as for :class:`RemoveBlocks`; in a graph that is masked already, what either masks is masked.

    Raises:
        InputError: no such block, or one that cannot be removed; says why.
        PassError: no names and no plan.
    """

    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", names_of_blocks(self.blocks))

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        if self.blocks is not None:
            blocks_named(gm, self.blocks)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        names = chosen_blocks(gm, self.blocks, artifacts, "MaskBlocks")
        if not names:
            return Outcome(gm, False, artifacts)
        plan = PrunePlan({}, {}, names)
        return Outcome(mask(gm, plan), True, Artifacts(plan=plan, report=artifacts.report))
