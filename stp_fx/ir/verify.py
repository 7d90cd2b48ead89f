"""Is this a graph that the rest can work on: well formed, nothing dangling, and it runs on its recorded example."""

from __future__ import annotations

import torch
from torch import fx

from stp_fx.errors import VerificationError
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.provenance import example_of
from stp_fx.ir.shapes import meta_twin

__all__ = ["verify"]


class _NamingInterpreter(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        try:
            return super().run_node(n)
        except Exception as error:
            raise VerificationError(f"node '{n.name}' ({n.format_node()}) does not run on meta tensors: {error}") from error


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
    runner = _NamingInterpreter(meta_twin(gm).eval(), garbage_collect_values=False, graph=gm.graph)
    runner.extra_traceback = False
    with torch.no_grad(), MetaRun():
        runner.run(*inputs)
