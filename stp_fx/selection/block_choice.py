"""``select_blocks``: which blocks are removed for a share of the cost, from their scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import fx

from stp_fx.analysis.blocks import Block, blocks_of, outermost, with_inner
from stp_fx.analysis.bypass import bypassed
from stp_fx.analysis.cost import cost
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_choice, is_number, shown
from stp_fx.errors import InputError, TargetError

__all__ = ["BLOCK_TARGETS", "BlockTarget", "check_target", "select_blocks"]

BlockTarget = Literal["macs", "params", "blocks"]
BLOCK_TARGETS: tuple[str, ...] = ("macs", "params", "blocks")


def select_blocks(
    gm: fx.GraphModule, scores: Mapping[str, float], ratio: float, *, target: BlockTarget = "macs", per_cost: bool = False
) -> PrunePlan:
    """The plan that removes blocks in the order of their scores, the lowest first, until the target is met.

    A block that turns out not to be needed for the target stays. Blocks are coarse, so more than asked for may be removed: what
    the plan saves is what :func:`stp_fx.cost` says of the result.

    Args:
        gm: the graph that the blocks are of.
        scores: by name, as :func:`score_blocks` gives them; blocks without a score stay.
        ratio: the fraction of the target that is removed at least, in [0, 1).
        target: "macs", "params", or "blocks" (their number).
        per_cost: whether scores are divided by what the block alone costs.

    Raises:
        InputError: a ratio or target that is none, or a score of a block that cannot be removed.
        TargetError: removing all blocks with a score does not reach the target; says how far it goes.
    """
    check_target(ratio, target)
    known = {block.name: block for block in blocks_of(gm)}
    for name in scores:
        if name not in known or known[name].reason:
            why = known[name].reason if name in known else "the graph has no such block"
            raise InputError(f"`scores` has an entry for {name!r}, which cannot be removed: {why}")
    among = tuple(known.values())

    def rank(block: Block) -> tuple[float, float]:
        amount = {"macs": block.macs, "params": block.params, "blocks": 1}[target]
        score = scores[block.name]
        return (score / max(amount, 1) if per_cost else score), -amount

    chosen: list[Block] = []
    for block in sorted((known[name] for name in scores), key=rank):
        if _removed(gm, chosen, among, target) >= ratio:
            break
        chosen.append(block)
    reached = _removed(gm, chosen, among, target)
    if reached < ratio:
        raise TargetError(
            f"removing all {len(chosen)} blocks that have a score removes {reached:.1%} of the {target}, and {ratio:.1%} are "
            "asked for: remove channels as well, or ask for less"
        )
    for block in reversed(chosen[:-1]):
        fewer = [each for each in chosen if each is not block]
        if _removed(gm, fewer, among, target) >= ratio:
            chosen = fewer
    return PrunePlan({}, {}, with_inner(outermost(chosen, among), among))


def check_target(ratio: object, target: object) -> None:
    """Raises for a ratio or target that is none.

    Raises:
        InputError: names what is expected.
    """
    if not is_number(ratio) or not 0 <= ratio < 1:
        raise InputError(f"`ratio` is the fraction that is removed, in [0, 1); got {shown(ratio)}")
    if not is_choice(target, BLOCK_TARGETS):
        raise InputError(f"unknown target for blocks {shown(target)}; known: {', '.join(BLOCK_TARGETS)}")


def _removed(gm: fx.GraphModule, chosen: list[Block], among: tuple[Block, ...], target: str) -> float:
    """The fraction of the target that goes with the blocks."""
    if not chosen:
        return 0.0
    if target == "blocks":
        return len(chosen) / sum(block.removable for block in among)
    whole, left = cost(gm), cost(bypassed(gm, outermost(chosen, among)))
    return 1 - getattr(left, target) / max(getattr(whole, target), 1)
