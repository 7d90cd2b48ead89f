"""Augmented assignments (``y += x``) write in place. Where nobody sees the difference, the graph has a plain operator instead.

Plain operators are what graphs of torch.fx have there, and what makes no trouble for autograd or for caches of values. The
difference is seen by whoever reads the old value, or a view of it, afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from stp_fx.ir.nested import leaves_of

__all__ = ["may_write", "relax", "shares_memory"]

_AUGMENTED = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"})


def may_write(node: fx.Node, root: nn.Module | None = None) -> bool:
    """Whether a call, by its name and arguments, writes to what it is given; ``root`` has the modules that are called."""
    if node.op == "call_module":
        return root is not None and any(getattr(m, "inplace", False) for m in root.get_submodule(str(node.target)).modules())
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    named = name.strip("_") in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))
    return named or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def relax(graph: fx.Graph, augmented: Mapping[fx.Node, Callable[..., Any]]) -> None:
    """Puts the plain operators where they do the same; ``augmented`` maps in-place nodes to them.

    Needs the meta value of every node, whose storage tells what is a view of what.
    """
    if not augmented:
        return
    place = {node: k for k, node in enumerate(graph.nodes)}
    sharing: dict[int, list[tuple[int, int]]] = {}
    """By storage: when a value that lies there is made, and when it is read for the last time."""
    for node in graph.nodes:
        last = max((place[reader] for reader in node.users), default=-1)
        for storage in _storages(node.meta.get("val")):
            sharing.setdefault(storage, []).append((place[node], last))
    for node, plain in augmented.items():
        target: Any = node.args[0]
        values = (times for storage in _storages(target.meta.get("val")) for times in sharing[storage])
        seen = any(made < place[node] < last for made, last in values)
        if not seen and target.op != "get_attr":
            node.op, node.target = "call_function", plain


def shares_memory(one: Any, other: Any) -> bool:
    """Whether two values have tensors that lie in one storage."""
    return bool(_storages(one) & _storages(other))


def _storages(value: Any) -> frozenset[int]:
    tensors = (tensor for tensor in leaves_of(torch.Tensor, value) if tensor.layout is torch.strided)
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)
