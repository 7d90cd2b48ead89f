"""Buffers to which a forward assigns (``self.mean = ...``): the graph writes into the ones that are there."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from stp_fx.ir.in_place import shares_memory

__all__ = ["with_assignments"]


def with_assignments(tracer: Any, result: Any) -> Any:
    """What the forward returns, once the buffers to which it has assigned are written to; ``tracer`` is a ``ModuleTracer``.

    A buffer that is assigned another shape or dtype stays as it is, and is noted.
    """
    for path, module in tracer.root.named_modules():
        for key, value in module._buffers.items():
            name = f"{path}.{key}" if path else key
            before = tracer.buffer_metas.get(name)
            if not isinstance(value, fx.Proxy) or before is None or not _fits(value.node.meta["val"], before):
                continue
            if value.node.op != "get_attr" or value.node.target != name:
                result = pytree.tree_map(lambda leaf, kept=before: _apart(leaf, kept), result)
                tracer.stored_proxy(name).copy_(value.detach())
            tracer.written.add(name)
    return result


def _apart(leaf: Any, stored: torch.Tensor) -> Any:
    """A value that is returned and lies in the memory of a tensor that is written to now: a copy."""
    value = leaf.node.meta["val"] if isinstance(leaf, fx.Proxy) else None
    return leaf.clone() if isinstance(value, torch.Tensor) and shares_memory(value, stored) else leaf


def _fits(value: Any, buffer: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (buffer.shape, buffer.dtype)
