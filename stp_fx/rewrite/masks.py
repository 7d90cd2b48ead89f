"""Masks in the graph: what a contraction reads of a dead unit is zero, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.rules import Dim, TensorDims

__all__ = ["add_masks", "drop_masks", "is_mask_buffer"]

_PREFIX = "stp_fx_dead"


def is_mask_buffer(name: str) -> bool:
    """Whether a tensor of this name is one of the masks, so no part of the network itself."""
    return name.startswith(_PREFIX)


def add_masks(gm: fx.GraphModule, graph: ChannelGraph, alive: np.ndarray) -> int:
    """Puts a mask before every contraction that sums over a dead unit; returns how many.

    A mask is a bool buffer (True: dead) and a ``masked_fill`` with zero: no gradient reaches what is dead, and an overflow
    there cannot leak. Consumers read zero, not the producers' zeroed output, which a bias or a norm would revive.
    """
    contracted: dict[str, list[np.ndarray]] = {}
    for entry in graph.contractions:
        ids = [f.ids for dim in entry.contracted for f in dim if f.ids is not None]
        contracted.setdefault(entry.node, []).extend(ids)
    device = next((t.device for t in gm.parameters()), torch.device("cpu"))
    made: dict[tuple[str, int, bytes], fx.Node] = {}
    for node in list(gm.graph.nodes):
        if contracted.get(node.name):
            _mask_operands(gm, graph, node, np.concatenate(contracted[node.name]), alive, made, device)
    gm.recompile()
    return len(made)


def _mask_operands(
    gm: fx.GraphModule,
    graph: ChannelGraph,
    node: fx.Node,
    ids: np.ndarray,
    alive: np.ndarray,
    made: dict[tuple[str, int, bytes], fx.Node],
    device: torch.device,
) -> None:
    label = graph.solution.label
    summed = np.zeros(graph.solution.count, dtype=bool)
    summed[label[ids]] = True
    for product in reversed(graph.solution.products):
        for factor, where in zip(product.factors, np.nonzero(summed[product.classes]), strict=True):
            summed[factor[where]] = True
    for product in graph.solution.products:
        for k, factor in enumerate(product.factors):
            summed[np.moveaxis(product.classes, k, 0)[summed[factor]]] = True
    operands = [n for n in node.all_input_nodes if isinstance(graph.value(n.name), TensorDims)]
    activations = [n for n in operands if n.op != "get_attr"]
    for chosen in (activations, operands):
        found = [(n, k, dead) for n in chosen for k, dead in _dead(graph.value(n.name), label, summed & ~alive)]
        if found:
            for source, k, dead in found:
                _insert(gm, node, source, k, dead, len(graph.value(source.name).dims), made, device)
            return


def _dead(value: TensorDims, label: np.ndarray, dead: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Dimensions of a value with dead positions."""
    for k, dim in enumerate(value.dims):
        flags = _any_dead(dim, label, dead)
        if flags.any():
            yield k, flags


def _any_dead(dim: Dim, label: np.ndarray, dead: np.ndarray) -> np.ndarray:
    flags = np.zeros(1, dtype=bool)
    for factor in dim:
        part = np.zeros(factor.size, dtype=bool) if factor.ids is None else dead[label[factor.ids]]
        flags = (flags[:, None] | part[None, :]).reshape(-1)
    return flags


def _insert(
    gm: fx.GraphModule,
    node: fx.Node,
    source: fx.Node,
    dim: int,
    dead: np.ndarray,
    rank: int,
    made: dict[tuple[str, int, bytes], fx.Node],
    device: torch.device,
) -> None:
    key = (source.name, dim, dead.tobytes())
    current = next((n for n in node.all_input_nodes if n is source or _unmasked(n) is source), source)
    if key not in made or current is not source:
        name = f"{_PREFIX}_{sum(1 for b in gm._buffers if b.startswith(_PREFIX))}"
        shape = [1] * rank
        shape[dim] = len(dead)
        gm.register_buffer(name, torch.from_numpy(dead.copy()).reshape(shape).to(device))
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
    """Takes out all masks, or with ``idle`` those that hold nothing dead any more."""
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
