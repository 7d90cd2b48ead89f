"""Is this a graph that the rest can work on: well formed, nothing dangling, and it runs on its recorded example."""

from __future__ import annotations

import torch
from torch import fx

from stp_fx.errors import VerificationError
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.provenance import example_of
from stp_fx.ir.runner import run_node
from stp_fx.ir.shapes import meta_twin

__all__ = ["verify"]


def verify(gm: fx.GraphModule) -> None:
    """Checks a captured graph.

    Raises:
        InputError: no recorded example.
        VerificationError: not well formed, a target that does not exist, or a node that does not run; names the node.
    """
    inputs = example_of(gm)
    try:
        gm.graph.lint()
    except Exception as error:
        raise VerificationError(f"the graph is not well formed: {error}") from error
    twin, given = meta_twin(gm).eval(), iter(inputs)
    env: dict[fx.Node, object] = {}
    with torch.no_grad(), MetaRun():
        for node in gm.graph.nodes:
            try:
                env[node] = run_node(node, env.__getitem__, twin, given)
            except Exception as error:
                raise VerificationError(
                    f"node '{node.name}' ({node.format_node()}) does not run on meta tensors: {error}"
                ) from error
