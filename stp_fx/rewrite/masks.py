"""Masks in the graph: contractions read zero from a masked unit, and its gradient is zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.blocks import Block
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.ir.modes import modes_of
from stp_fx.ir.provenance import MASK_PREFIX, floating_dtype, is_mask_buffer
from stp_fx.rules import TensorDims

__all__ = ["add_block_masks", "add_masks", "drop_masks", "is_mask_buffer"]


def add_masks(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors, device: torch.device | None = None) -> int:
    """Puts a mask before every contraction that sums over a unit that does not survive; returns how many.

    A mask is a buffer (1: masked) and a ``masked_fill`` with zero: no gradient reaches a masked unit, and an overflow there
    cannot leak. Consumers read zero, not the producers' zeroed output, which a bias or a norm would revive. The buffer has the
    dtype of the parameters: averages of weights and buffers (SWA) have no difference of booleans. It is on ``device``, by default
    that of the parameters.
    """
    contracting = {entry.node for entry in graph.contractions}
    masks = _Masks(gm, graph, survivors, device)
    for node, mode in list(modes_of(gm.graph)):
        if node.name in contracting:
            masks.before(node, mode)
        for dim, removed, value in survivors.excluded(node.name):
            masks.exclude(node, mode, dim, removed, value)
    gm.recompile()
    return len(masks.made)


class _Masks:
    """``made``: masked values by source, dimension, what is removed, and the mode that runs them."""

    def __init__(self, gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors, device: torch.device | None) -> None:
        self._gm, self._graph, self._survivors, self._device = gm, graph, survivors, device
        self.made: dict[tuple[str, int, bytes, str], fx.Node] = {}

    def before(self, node: fx.Node, mode: str) -> None:
        """Masks what ``node``, which runs in ``mode``, sums over."""
        operands = [n for n in node.all_input_nodes if isinstance(self._graph.value(n.name), TensorDims)]
        activations = [n for n in operands if n.op != "get_attr"]
        for chosen in (activations, operands):
            sources = {n.name: n for n in chosen}
            found = self._survivors.removed_inputs(node.name, sources)
            for name, k, removed in found:
                self._insert(node, mode, sources[name], k, removed)
            if found:
                return

    def exclude(self, node: fx.Node, mode: str, dim: int, removed: np.ndarray, value: float) -> None:
        """Lets ``node`` read ``value``, of which it takes no notice, at removed positions of its first operand."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_input_with(source, self._new(node, source, dim, removed, self._rank(source), value))
        self.made[node.name, dim, removed.tobytes(), mode] = node.args[0]  # type: ignore[assignment]

    def _rank(self, source: fx.Node) -> int:
        return len(self._graph.value(_unmasked(source).name).dims)

    def _insert(self, node: fx.Node, mode: str, source: fx.Node, dim: int, removed: np.ndarray) -> None:
        known = [self.made.get((source.name, dim, removed.tobytes(), place)) for place in ("both", mode)]
        masked = next((each for each in known if each is not None), None)
        current = next((n for n in node.all_input_nodes if n is source or _unmasked(n) is source), source)
        if masked is None or current is not source:
            masked = self._new(node, current, dim, removed, len(self._graph.value(source.name).dims))
            if current is source:
                self.made[source.name, dim, removed.tobytes(), mode] = masked
        node.replace_input_with(current, masked)

    def _new(self, node: fx.Node, current: fx.Node, dim: int, removed: np.ndarray, rank: int, value: float = 0.0) -> fx.Node:
        shape = [1] * rank
        shape[dim] = len(removed)
        return _masked(self._gm, node, current, torch.from_numpy(removed.copy()).reshape(shape), self._device, value)


def add_block_masks(gm: fx.GraphModule, blocks: Sequence[Block]) -> None:
    """Puts a mask before every sum of ``blocks``, in place: a flag, and a ``masked_fill`` with zero of what the block adds."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for block in blocks:
        total, value = nodes[block.total], nodes[block.value]
        total.replace_input_with(value, _masked(gm, total, value, torch.ones((), dtype=torch.bool)))
    gm.recompile()


def _masked(
    gm: fx.GraphModule,
    node: fx.Node,
    value: fx.Node,
    removed: torch.Tensor,
    device: torch.device | None = None,
    filling: float = 0.0,
) -> fx.Node:
    """The node that ``node`` is to read in place of ``value``: ``filling`` where the flags are set."""
    name = f"{MASK_PREFIX}_{sum(1 for b in gm._buffers if is_mask_buffer(b))}"
    device = device or next((t.device for t in gm.parameters()), torch.device("cpu"))
    gm.register_buffer(name, removed.to(device, floating_dtype(gm) or torch.get_default_dtype()))
    with gm.graph.inserting_before(node):
        flags = gm.graph.call_method("bool", (gm.graph.get_attr(name),))
        return gm.graph.call_method("masked_fill", (value, flags, filling))


def _buffer_of(node: fx.Node) -> fx.Node | None:
    """The node that reads the mask's buffer, if ``node`` is a mask."""
    flags = node.args[1] if node.op == "call_method" and node.target == "masked_fill" and len(node.args) > 1 else None
    if not isinstance(flags, fx.Node) or flags.op != "call_method" or flags.target != "bool":
        return None
    read = flags.args[0]
    return read if isinstance(read, fx.Node) and read.op == "get_attr" and is_mask_buffer(str(read.target)) else None


def _unmasked(node: fx.Node) -> fx.Node:
    """The value under any number of masks."""
    while _buffer_of(node) is not None:
        node = node.args[0]  # type: ignore[assignment]
    return node


def drop_masks(gm: fx.GraphModule, *, idle: bool = False) -> None:
    """Removes all masks, or with ``idle`` only those that mask nothing any more."""
    dropped = False
    for node in list(gm.graph.nodes):
        read = _buffer_of(node)
        if read is None or (idle and bool(getattr(gm, str(read.target)).any())):
            continue
        flags: Any = node.args[1]
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        for each in (node, flags):
            if not each.users:
                gm.graph.erase_node(each)
        if not read.users:
            gm.graph.erase_node(read)
            delattr(gm, str(read.target))
        dropped = True
    if dropped:
        gm.recompile()
