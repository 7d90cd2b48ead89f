"""Buffers to which a forward assigns (``self.mean = ...``): the graph writes into the ones that are there."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

__all__ = ["with_assignments"]


def with_assignments(tracer: Any, result: Any) -> Any:
    """The output of the forward, once the buffers to which it has assigned are written to; ``tracer`` is a ``ModuleTracer``.

    A buffer that is assigned another shape or dtype stays as it is, and is noted.
    """
    assigned: dict[str, fx.Proxy] = {}
    for path, module in tracer.root.named_modules():
        for key, value in module._buffers.items():
            name = f"{path}.{key}" if path else key
            before = tracer.buffer_metas.get(name)
            if isinstance(value, fx.Proxy) and before is not None and _fits(value.node.meta["val"], before):
                assigned[name] = value
    tracer.written.update(assigned)
    changed = {name: value for name, value in assigned.items() if (value.node.op, value.node.target) != ("get_attr", name)}
    copies = {node: copied for name in changed for node, copied in (_read_apart(tracer, name),)}

    def kept(leaf: Any) -> Any:
        return tracer.proxy(copies[leaf.node]) if isinstance(leaf, fx.Proxy) and leaf.node in copies else leaf

    for name, value in changed.items():
        tracer.stored_proxy(name).copy_(kept(value).detach())
    return pytree.tree_map(kept, result)


def _read_apart(tracer: Any, name: str) -> tuple[fx.Node, fx.Node]:
    """The node that reads a buffer, and a copy for all who use it: autograd may keep the old value."""
    node = tracer.stored_proxy(name).node
    with tracer.graph.inserting_after(node):
        copied = tracer.graph.call_method("clone", (node,))
    copied.meta["val"] = tracer.buffer_metas[name].clone()
    node.replace_all_uses_with(copied, lambda user: user is not copied)
    return node, copied


def _fits(value: Any, buffer: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (buffer.shape, buffer.dtype)
