"""Weights that are not what they compute with: quantised tensors of PyTorch, torchao and the like, and packed objects."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["quantised_part"]


def quantised_part(model: nn.Module) -> str | None:
    """The name of a quantised parameter or buffer, or of a module that keeps packed weights; None if there is none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_quantized or _wraps_integers(tensor):
            return name
    for name, module in model.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            return name or type(module).__name__
    return None


def _wraps_integers(tensor: torch.Tensor) -> bool:
    """Whether a subclass that says it is floating keeps integers, or floats of a byte, inside."""
    if not is_traceable_wrapper_subclass(tensor) or not tensor.is_floating_point():
        return False
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = [getattr(tensor, name) for name in names]
    return any(
        isinstance(t, torch.Tensor) and (t.element_size() == 1 or not t.is_floating_point() or _wraps_integers(t)) for t in inner
    )
