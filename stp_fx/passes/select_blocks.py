"""SelectBlocks: scores of residual branches to a plan of which are removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from stp_fx.analysis.blocks import blocks_of
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import check_flag, is_choice, shown
from stp_fx.errors import InputError, TargetError
from stp_fx.measure.calibration import reiterable
from stp_fx.measure.gradients import Loss
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.without_blocks import without_blocks
from stp_fx.selection.block_choice import BlockTarget, check_target, select_blocks
from stp_fx.selection.block_scores import BLOCK_CRITERIA, BlockCriterion, score_blocks

__all__ = ["SelectBlocks"]


@dataclasses.dataclass(frozen=True)
class SelectBlocks(GraphPass):
    """Chooses the blocks to remove for a share of the cost; :class:`RemoveBlocks` or :class:`MaskBlocks` behind it in the
    pipeline carries the plan out.

    Args:
        ratio: the fraction of the target that is removed at least, in [0, 1).
        target: "macs", "params" or "blocks".
        criterion, calibration, loss: as for :func:`stp_fx.score_blocks`.
        per_cost: whether scores are divided by what a block costs.
        iterative: whether the others are scored anew, without the chosen ones, after each choice; False scores once.

    Raises:
        InputError: an argument that is none, or data that is needed and not given.
        TargetError: removing all blocks does not reach the target.
    """

    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"

    ratio: float
    target: BlockTarget = "macs"
    criterion: BlockCriterion = "influence"
    calibration: Iterable[Any] | torch.Tensor | None = dataclasses.field(default=None, repr=False)
    loss: Loss | None = dataclasses.field(default=None, repr=False)
    per_cost: bool = False
    iterative: bool = True

    def __post_init__(self) -> None:
        check_target(self.ratio, self.target)
        check_flag("per_cost", self.per_cost)
        check_flag("iterative", self.iterative)
        if not is_choice(self.criterion, BLOCK_CRITERIA):
            raise InputError(f"unknown criterion for blocks {shown(self.criterion)}; known: {', '.join(BLOCK_CRITERIA)}")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", reiterable(self.calibration))

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        return Outcome(gm, False, artifacts.with_(plan=self._plan(gm)))

    def _plan(self, gm: fx.GraphModule) -> PrunePlan:
        scores = self._scores(gm)
        if not self.iterative:
            return select_blocks(gm, scores, self.ratio, target=self.target, per_cost=self.per_cost)
        order: dict[str, float] = {}
        rest = gm
        while True:
            try:
                return select_blocks(gm, order, self.ratio, target=self.target)
            except TargetError:
                if not scores:
                    raise
            costs = {block.name: {"macs": block.macs, "params": block.params}.get(self.target, 1) for block in blocks_of(rest)}
            ranks = {name: score / max(costs[name], 1) if self.per_cost else score for name, score in scores.items()}
            weakest = min(ranks, key=ranks.__getitem__)
            order[weakest] = float(len(order))
            rest = without_blocks(rest, [weakest])
            scores = self._scores(rest)

    def _scores(self, gm: fx.GraphModule) -> dict[str, float]:
        return score_blocks(gm, self.criterion, self.calibration, loss=self.loss)
