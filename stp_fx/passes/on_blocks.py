"""The common part of passes over residual branches: the blocks that they are about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from torch import fx

from stp_fx.analysis.blocks import blocks_named, blocks_of, outermost
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_a, shown
from stp_fx.errors import InputError
from stp_fx.passes.artifacts import Artifacts
from stp_fx.passes.base import GraphPass

__all__ = ["OnBlocks"]


@dataclasses.dataclass(frozen=True)
class OnBlocks(GraphPass, abstract=True):
    """``blocks`` are names, as :func:`stp_fx.blocks_of` gives them, a plan with blocks, or None for the plan of the pipeline."""

    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _names(self.blocks))

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        if self.blocks is not None:
            blocks_named(gm, self.blocks)

    def chosen(self, gm: fx.GraphModule, artifacts: Artifacts) -> tuple[str, ...]:
        """The blocks that are named, or that the plan of the pipeline names, without those inside others.

        Raises:
            PassError: no names and no plan.
            InputError: no such block, or one that cannot be removed.
        """
        found = blocks_named(gm, artifacts.planned(type(self).__name__).blocks if self.blocks is None else self.blocks)
        return tuple(block.name for block in outermost(found, blocks_of(gm)))


def _names(given: object) -> tuple[str, ...] | None:
    """Names of blocks as a tuple; those of a plan, if it is one.

    Raises:
        InputError: neither.
    """
    if given is None or isinstance(given, PrunePlan):
        return None if given is None else given.blocks
    names = () if is_a(given, str) or not is_a(given, Sequence) else tuple(cast("Sequence[object]", given))
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"`blocks` is a sequence of names (see stp_fx.blocks_of), a plan or None; got {shown(given)}")
    return cast("tuple[str, ...]", names)
