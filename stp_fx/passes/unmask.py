"""UnmaskChannels: takes the masks out again; what was dead reads as it did."""

from __future__ import annotations

import dataclasses

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.ir.provenance import provenance_of
from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.masks import drop_masks
from stp_fx.rewrite.slicing import copied

__all__ = ["UnmaskChannels"]


@dataclasses.dataclass(frozen=True)
class UnmaskChannels(GraphPass):
    """The graph without any mask; weights are as they are, so training and compensation since then stay.

    A graph that is not masked comes back as it is.
    """

    def call(self, gm: fx.GraphModule) -> PassResult:
        if provenance_of(gm).masked is None:
            return PassResult(gm, False)
        result = copied(gm)
        drop_masks(result)
        provenance_of(result).masked = None
        return PassResult(result, True)
