"""RotateHeads: the positions inside attention heads in the basis of the projections' singular vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.errors import NothingToRotateError
from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.basis.change import rotated_heads

__all__ = ["RotateHeads"]


@dataclasses.dataclass(frozen=True)
class RotateHeads(GraphPass):
    """Turns the positions inside every attention head so that the first ones carry the most, and keeps the function.

    Any matrix may stand between a head's values and the output projection, and between its queries and keys, with its inverse on
    the other side. Taken are those of the singular value decomposition of the product of both projections, so that cutting the
    last positions of a head is the best approximation of that rank: with ``calibration``, of what the heads give on these
    batches, without it for inputs without correlation. Heads that share keys and values share the matrices. Names and shapes of
    parameters stay as they are.

    Two linear layers or convolutions with nothing but linear ops in between (adapters, factorised layers) are turned alike.
    Queries and keys with rotary positions or norms keep their basis; their values are turned.

    Raises:
        NothingToRotateError: no attention allows it.
        InputError: ``calibration`` has no batch, or one that does not fit.
        RewriteError: the result computes something else; nothing has been changed.
    """

    calibration: Iterable[Any] | None = dataclasses.field(default=None, repr=False)

    def call(self, gm: fx.GraphModule) -> PassResult:
        changed = rotated_heads(gm, self.calibration)
        if not changed.done:
            raise NothingToRotateError(
                f"no head can be turned: {changed.reasons or 'the graph has no attention between stored projections'}. Go on "
                "without RotateHeads"
            )
        return PassResult(changed.graph, True)
