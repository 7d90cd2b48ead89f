"""MACs and parameters of a network by counters that know nothing of stp_fx."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from _coverage_networks import Inputs, Network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["counted_macs", "counted_params"]


def counted_macs(module: nn.Module, inputs: Inputs, subject: Network, original: bool = False) -> int:
    """Multiply-accumulates by PyTorch's own counter, which knows nothing of stp_fx.

    Run on meta tensors: nothing is computed, and ``nn.MultiheadAttention`` does not take its fused path, which the
    counter does not see into. Hugging Face's mask helpers read values, so those networks, which are small, are computed.
    """
    positional, named = inputs
    named = {**named, **(subject.constants if original else {})}
    try:
        return _counted(module, positional, named, "cpu" if subject.reads_values else "meta")
    except NotImplementedError:  # the module's code makes tensors of its own, on the CPU
        return _counted(module, positional, named, "cpu")


def _grouped_flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Each row times the matrix of its group."""
    return 2 * a[-2] * b[-2] * b[-1]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


_FORMULAS = {"_grouped_mm": _grouped_flops, "_scaled_dot_product_flash_attention_for_cpu": _attention_flops}
_UNCOUNTED = {getattr(torch.ops.aten, name): flops for name, flops in _FORMULAS.items() if hasattr(torch.ops.aten, name)}
"""Products that PyTorch's counter leaves out. Code that chooses a kernel for attention gets it, whatever is chosen around it."""


def _counted(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], device: str) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    memo = {id(t): nn.Parameter(t.to(device)) if isinstance(t, nn.Parameter) else t.to(device) for t in tensors}
    twin = copy.deepcopy(module, memo).requires_grad_(False)
    positional, named = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, (positional, named))
    plain = torch.backends.mkldnn.flags(enabled=False)  # whose LSTM is one op, which the counter does not know
    with (
        FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter,
        torch.no_grad(),
        plain,
        sdpa_kernel(SDPBackend.MATH),
    ):
        twin(*positional, **named)
    return counter.get_total_flops() // 2


def counted_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
