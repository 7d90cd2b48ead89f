"""UnmaskChannels: removes the masks, so that consumers read the masked units again."""

from __future__ import annotations

import dataclasses

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.removal import unmask

__all__ = ["UnmaskChannels"]


@dataclasses.dataclass(frozen=True)
class UnmaskChannels(GraphPass):
    """The graph without any mask; weights are as they are, so training and compensation since the masking are kept.

    A graph that is not masked is returned as it is.
    """

    def call(self, gm: fx.GraphModule) -> PassResult:
        result = unmask(gm)
        return PassResult(result, result is not gm)
