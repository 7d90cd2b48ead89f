"""Shortened copies of tensors: dtype, device, memory format, ``requires_grad``, gradients and ties are kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.rewrite.module_copies import copy_modules_of_torch

__all__ = ["copied", "shortened_copy", "take"]

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


def take(tensor: torch.Tensor, kept: Mapping[int, np.ndarray]) -> torch.Tensor:
    """The given positions of the given dimensions, as a new tensor in the same memory format."""
    result = tensor.detach()
    for dim in sorted(kept):
        index = torch.from_numpy(np.ascontiguousarray(kept[dim])).to(tensor.device)
        result = result.index_select(dim, index)
    if not kept:
        return result.clone()
    for memory_format, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.dim() == rank and tensor.is_contiguous(memory_format=memory_format) and not tensor.is_contiguous():
            return result.contiguous(memory_format=memory_format)
    return result.contiguous()


def shortened_copy(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> fx.GraphModule:
    """A deep copy of ``gm`` in which every tensor has only the positions that survive. Never copies the others."""
    per_tensor: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), positions in survivors.axes.items():
        per_tensor.setdefault(name, {})[dim] = positions
    memo: dict[int, Any] = {}
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        cuts = per_tensor.get(graph.first_name(name), {})
        short = take(_renumbered(tensor, survivors.indexed(name)), cuts)
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            _log.warning("hooks on the gradient of %r stay on the original: register them on the new parameter", name)
        memo[id(tensor)] = _like_parameter(tensor, short, cuts) if isinstance(tensor, nn.Parameter) else short
    return copied(gm, memo)


def copied(gm: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy; ``memo`` maps ``id`` of a tensor to what stands in its place.

    Tensors that hooks compute and leave on a module (``torch.nn.utils.weight_norm``) cannot be copied and are computed
    again at the next call: their copies are detached. Tensors in compressed sparse layouts, which ``copy`` refuses, are cloned.
    """
    memo = {} if memo is None else memo
    for module in gm.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None and value.layout is not torch.strided:
                clone = value.detach().clone()
                memo.setdefault(id(value), _like_parameter(value, clone, {}) if isinstance(value, nn.Parameter) else clone)
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
    copy_modules_of_torch(gm, memo)
    return copy.deepcopy(gm, memo)


def _like_parameter(old: nn.Parameter, data: torch.Tensor, cuts: Mapping[int, np.ndarray]) -> nn.Parameter:
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = take(old.grad, cuts)
    for key, value in old.__dict__.items():
        setattr(new, key, value)
    return new


def _renumbered(tensor: torch.Tensor, keep: np.ndarray | None) -> torch.Tensor:
    """A buffer whose values are positions along an axis, of which the flagged ones are kept; any other tensor as it is."""
    if keep is None:
        return tensor
    rank = torch.from_numpy(np.concatenate([[0], np.cumsum(keep)])).to(tensor.device)
    return rank[tensor % len(keep)].to(tensor.dtype)
