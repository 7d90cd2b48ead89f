"""RotateResidual: a residual stream in the basis of its principal components (SliceGPT, arXiv 2401.15024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.errors import NothingToRotateError
from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.basis.change import rotated_residuals

__all__ = ["RotateResidual"]


@dataclasses.dataclass(frozen=True)
class RotateResidual(GraphPass):
    """Rotates every residual stream that commutes with rotations into its principal components, and keeps the function.

    A stream is what norms normalise, together with all that writes into it and reads it. LayerNorms become RMSNorms on the way
    (:class:`LayerNormToRMSNorm`), and layer scales move into the contractions before them. With ``calibration`` the components
    are of what the norms give on these batches, without it of the weights. The first channels have the most energy, so
    the criterion "variance" takes the last ones.

    In training, dropout on the stream drops directions of the new basis.

    Raises:
        NothingToRotateError: no stream can be rotated; says why for each.
        InputError: ``calibration`` has no batch, or one that does not fit.
        RewriteError: the result computes something else; nothing has been changed.
    """

    calibration: Iterable[Any] | None = dataclasses.field(default=None, repr=False)

    def call(self, gm: fx.GraphModule) -> PassResult:
        changed = rotated_residuals(gm, self.calibration)
        if not changed.done:
            raise NothingToRotateError(
                f"nothing can be rotated: {changed.reasons or 'the graph has no norm over channels (LayerNorm, RMSNorm)'}. "
                "Go on without a change of basis"
            )
        return PassResult(changed.graph, True)
