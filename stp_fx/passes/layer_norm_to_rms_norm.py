"""LayerNormToRMSNorm: the mean that a LayerNorm takes away is never written (SliceGPT, arXiv 2401.15024, section 3.1)."""

from __future__ import annotations

import dataclasses

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.basis.change import layer_norms_to_rms_norms

__all__ = ["LayerNormToRMSNorm"]


@dataclasses.dataclass(frozen=True)
class LayerNormToRMSNorm(GraphPass):
    """Makes the LayerNorms over a residual stream RMSNorms, and keeps the function.

    The scale and shift of each norm move into the contractions that read it, and everything that writes into the stream (weights,
    biases, embeddings, class tokens, positions) is centred over the channels. A norm keeps ``norm.weight``, all
    ones, and loses ``norm.bias``. A contraction without bias gets one to take over a shift.

    Streams of which something else reads the mean, or a norm's scale, keep their LayerNorms; the log of ``stp_fx.basis`` has the
    reasons. Removing channels of a converted stream is exact.

    Raises:
        RewriteError: the result computes something else; nothing has been changed.
    """

    def call(self, gm: fx.GraphModule) -> PassResult:
        changed = layer_norms_to_rms_norms(gm)
        return PassResult(changed.graph, bool(changed.done))
