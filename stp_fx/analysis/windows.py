"""The input patch of each output position of a convolution, as a view of its input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

__all__ = ["Windows"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a convolution of 1 to 3 dimensions, transposed ones too.

    ``padding``: before and after each spatial dimension, the last one first, as :func:`torch.nn.functional.pad` takes them. A
    transposed convolution is one over its input with zeros between the positions (``spread`` apart) and the taps in reverse.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    mode: str = "constant"
    spread: tuple[int, ...] | None = None

    @classmethod
    def of_module(cls, module: nn.Module) -> Windows | None:
        """Those of a convolution module; None for another."""
        if isinstance(module, _ConvTransposeNd):
            kernel, dilation = module.kernel_size, module.dilation
            sides: list[int] = []
            for k, p, d, extra in zip(kernel, module.padding, dilation, module.output_padding, strict=True):
                reach = (k - 1) * d - int(p)
                sides = [reach, reach + extra, *sides]
            return cls(kernel, (1,) * len(kernel), tuple(sides), dilation, spread=module.stride)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            return cls(module.kernel_size, module.stride, tuple(module._reversed_padding_repeated_twice), module.dilation, mode)
        return None

    @classmethod
    def of_call(cls, kernel: tuple[int, ...], options: Mapping[str, Any]) -> Windows | None:
        """Those of a call of ``torch.nn.functional.conv1d`` and its like with these options; None if one is not a number."""
        rank = len(kernel)
        stride, dilation = (_tuple(options.get(key, 1), rank) for key in ("stride", "dilation"))
        padding = options.get("padding", 0)
        if stride is None or dilation is None:
            return None
        if padding == "same":
            totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
            return cls(kernel, stride, tuple(n for t in reversed(totals) for n in (t // 2, t - t // 2)), dilation)
        sides = _tuple(0 if padding == "valid" else padding, rank)
        return None if sides is None else cls(kernel, stride, tuple(n for p in reversed(sides) for n in (p, p)), dilation)

    def over(self, value: torch.Tensor) -> torch.Tensor:
        """The windows of a batch [n, channels, *positions]: a view [n, channels, *output positions, *taps]."""
        rank = len(self.kernel)
        if self.spread is not None:
            value = _spread(value, self.spread)
        if any(self.padding):
            value = F.pad(value, self.padding, mode=self.mode)
        for k, (size, dilation, stride) in enumerate(zip(self.kernel, self.dilation, self.stride, strict=True)):
            value = value.unfold(2 + k, (size - 1) * dilation + 1, stride)[..., ::dilation]
        return value.flip(tuple(range(2 + rank, 2 + 2 * rank))) if self.spread is not None else value


def _spread(value: torch.Tensor, steps: tuple[int, ...]) -> torch.Tensor:
    """``value`` with ``step - 1`` zeros between its positions."""
    if all(step == 1 for step in steps):
        return value
    sizes = [(n - 1) * step + 1 for n, step in zip(value.shape[2:], steps, strict=True)]
    result = value.new_zeros(*value.shape[:2], *sizes)
    result[(slice(None), slice(None), *(slice(None, None, step) for step in steps))] = value
    return result


def _tuple(value: Any, rank: int) -> tuple[int, ...] | None:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(n, int) for n in values) or len(values) not in (1, rank):
        return None
    return values * rank if len(values) == 1 else values
