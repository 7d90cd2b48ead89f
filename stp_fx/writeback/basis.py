"""Results of a change of basis for which the original class has no place."""

from __future__ import annotations

import json

from torch import fx, nn

from stp_fx.errors import WriteBackError
from stp_fx.ir.provenance import provenance_of
from stp_fx.text import listed

__all__ = ["check_basis"]


def check_basis(pruned: fx.GraphModule, model: nn.Module) -> None:
    """A class that computes LayerNorm, or holds one tensor where the graph has two, cannot compute what a rotated graph does.

    Raises:
        WriteBackError: names the norms and tensors.
    """
    constants: list[str] = []
    targets = {node.name: str(node.target) for node in pruned.graph.nodes}
    for record in map(json.loads, provenance_of(pruned).basis):
        if "rms" in record:
            constants.append(f"{targets.get(record['rms'], record['rms'])}: a LayerNorm that is an RMSNorm now")
        elif "untied" in record:
            constants.append(f"{record['untied']}: tied in the class, and two tensors now")
    if constants:
        raise WriteBackError(
            f"{type(model).__name__} cannot express a change of basis: {listed(constants, 3)}. Go on with the GraphModule, which "
            "trains, saves and exports as any other, or prune without `basis`",
            tuple(constants),
        )
