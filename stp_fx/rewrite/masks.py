"""Masks in the graph: contractions read zero from a masked unit, and its gradient is zero."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.ir.provenance import MASK_PREFIX, is_mask_buffer
from stp_fx.rules import TensorDims

__all__ = ["add_masks", "drop_masks", "is_mask_buffer"]


def add_masks(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> int:
    """Puts a mask before every contraction that sums over a unit that does not survive; returns how many.

    A mask is a bool buffer (True: masked) and a ``masked_fill`` with zero: no gradient reaches a masked unit, and an overflow
    there cannot leak. Consumers read zero, not the producers' zeroed output, which a bias or a norm would revive.
    """
    contracting = {entry.node for entry in graph.contractions}
    device = next((t.device for t in gm.parameters()), torch.device("cpu"))
    made: dict[tuple[str, int, bytes], fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.name in contracting:
            _mask_operands(gm, graph, node, survivors, made, device)
    gm.recompile()
    return len(made)


def _mask_operands(
    gm: fx.GraphModule,
    graph: ChannelGraph,
    node: fx.Node,
    survivors: Survivors,
    made: dict[tuple[str, int, bytes], fx.Node],
    device: torch.device,
) -> None:
    operands = [n for n in node.all_input_nodes if isinstance(graph.value(n.name), TensorDims)]
    activations = [n for n in operands if n.op != "get_attr"]
    for chosen in (activations, operands):
        sources = {n.name: n for n in chosen}
        found = survivors.removed_inputs(node.name, sources)
        for name, k, removed in found:
            _insert(gm, node, sources[name], k, removed, len(graph.value(name).dims), made, device)
        if found:
            return


def _insert(
    gm: fx.GraphModule,
    node: fx.Node,
    source: fx.Node,
    dim: int,
    removed: np.ndarray,
    rank: int,
    made: dict[tuple[str, int, bytes], fx.Node],
    device: torch.device,
) -> None:
    key = (source.name, dim, removed.tobytes())
    current = next((n for n in node.all_input_nodes if n is source or _unmasked(n) is source), source)
    if key not in made or current is not source:
        name = f"{MASK_PREFIX}_{sum(1 for b in gm._buffers if is_mask_buffer(b))}"
        shape = [1] * rank
        shape[dim] = len(removed)
        gm.register_buffer(name, torch.from_numpy(removed.copy()).reshape(shape).to(device))
        with gm.graph.inserting_before(node):
            flags = gm.graph.get_attr(name)
            masked = gm.graph.call_method("masked_fill", (current, flags, 0.0))
        if current is source:
            made[key] = masked
    node.replace_input_with(current, made[key] if current is source else masked)


def _is_mask(node: fx.Node) -> bool:
    flags = node.args[1] if node.op == "call_method" and node.target == "masked_fill" and len(node.args) > 1 else None
    return isinstance(flags, fx.Node) and flags.op == "get_attr" and is_mask_buffer(str(flags.target))


def _unmasked(node: fx.Node) -> fx.Node:
    """The value under any number of masks."""
    while _is_mask(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def drop_masks(gm: fx.GraphModule, *, idle: bool = False) -> None:
    """Removes all masks, or with ``idle`` only those that mask nothing any more."""
    dropped = False
    for node in list(gm.graph.nodes):
        if not _is_mask(node):
            continue
        flags = node.args[1]
        if not idle or not bool(getattr(gm, flags.target).any()):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            if not flags.users:
                gm.graph.erase_node(flags)
                delattr(gm, flags.target)
            dropped = True
    if dropped:
        gm.recompile()
