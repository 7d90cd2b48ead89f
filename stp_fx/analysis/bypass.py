"""A graph as it is without some of its blocks, for analysis alone: it shares all tensors, and sums keep their names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from stp_fx.analysis.blocks import Block, planned_blocks
from stp_fx.analysis.plan import PrunePlan
from stp_fx.ir.captured import CapturedGraph

__all__ = ["bypassed", "channels_of", "tensor_names"]


def bypassed(gm: fx.GraphModule, blocks: Sequence[Block]) -> fx.GraphModule:
    """``gm`` without ``blocks``, of which none lies in another: each of their sums is a copy of its other operand.

    Only what the nodes read is stored in it, as the very tensors and modules of ``gm``. Its analysis and cost are those of the
    graph that a removal would give, and tell of the nodes of ``gm`` by their names.
    """
    gone = {name for block in blocks for name in block.nodes}
    values = {(block.total, block.value) for block in blocks}
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    graph.set_codegen(copy.copy(gm.graph._codegen))
    known: dict[fx.Node, Any] = {}

    def now(value: Any) -> Any:
        return map_aggregate(value, lambda leaf: known[leaf] if isinstance(leaf, fx.Node) else leaf)

    totals = {block.total for block in blocks}
    empty: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.name in gone:
            continue
        operands = node.all_input_nodes
        left = [each for each in operands if (node.name, each.name) not in values and each not in empty]
        if (node.name in totals or len(left) < len(operands)) and not left:
            empty.add(node)
        elif len(left) < len(operands):
            known[node] = graph.create_node("call_function", torch.clone, (known[left[0]],), {}, node.name, node.type)
        else:
            known[node] = graph.create_node(node.op, node.target, now(node.args), now(node.kwargs), node.name, node.type)
    result = CapturedGraph(gm, graph, class_name=type(gm).__name__)
    result.meta = dict(gm.meta)
    return result


def channels_of(gm: fx.GraphModule, plan: PrunePlan) -> tuple[fx.GraphModule, PrunePlan]:
    """``gm`` without the blocks of a plan, for analysis alone, and the rest of the plan, which is about that graph.

    Raises:
        PlanError: a block that the graph does not have, or that cannot be removed.
    """
    if not plan.blocks:
        return gm, plan
    reduced = bypassed(gm, planned_blocks(gm, plan.blocks))
    return reduced, plan.without_blocks(tensor_names(reduced))


def tensor_names(gm: fx.GraphModule) -> set[str]:
    """The names of all parameters and buffers, every name of tied ones."""
    return {name for name, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))}
