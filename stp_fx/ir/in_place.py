"""Augmented assignments (``y += x``) write in place. Where nobody sees the difference, the graph has a plain operator instead.

Plain operators are what graphs of torch.fx have there, and what makes no trouble for autograd or for caches of values. The
difference is seen by whoever reads the old value, or a view of it, afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from stp_fx.ir.nested import leaves_of

__all__ = ["relax"]


def relax(graph: fx.Graph, augmented: Mapping[fx.Node, Callable[..., Any]]) -> None:
    """Puts the plain operators where they do the same; ``augmented`` maps in-place nodes to them.

    Needs the meta value of every node, whose storage tells what is a view of what.
    """
    if not augmented:
        return
    nodes: list[Any] = list(graph.nodes)
    place = {node: k for k, node in enumerate(nodes)}
    storages = {node: _storages(node.meta.get("val")) for node in nodes}
    for node, plain in augmented.items():
        target: Any = node.args[0]
        later = (source for reader in nodes[place[node] + 1 :] for source in reader.all_input_nodes)
        seen = any(place[source] < place[node] and storages[source] & storages[target] for source in later)
        if not seen and target.op != "get_attr":
            node.op, node.target = "call_function", plain


def _storages(value: Any) -> frozenset[int]:
    tensors = (tensor for tensor in leaves_of(torch.Tensor, value) if tensor.layout is torch.strided)
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)
