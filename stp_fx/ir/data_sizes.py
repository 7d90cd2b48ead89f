"""Shapes that depend on data, where a graph runs for its shapes: a mask takes as many positions as there are, and a few more.

How many positions ``nonzero`` or a boolean index gives is in no shape. The rows between a selection and the sum that puts
them back (the tokens of an expert) may be any number, so one is made up: the next prime, which no other size is likely to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BY_DATA", "data_size"]

_aten = torch.ops.aten


def data_size(positions: int) -> int:
    """How many of ``positions`` data select: the smallest prime above.

    >>> data_size(32)
    37
    """
    size = positions + 1
    while any(size % divisor == 0 for divisor in range(2, math.isqrt(size) + 1)):
        size += 1
    return size


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((data_size(x.numel()), x.dim()), dtype=torch.int64)


def _masked_select(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return x.new_empty((data_size(math.prod(shape)),))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _index(x: torch.Tensor, indices: list[torch.Tensor | None]) -> Any:
    """A mask of several dimensions is an index along each."""
    if not any(map(_is_mask, indices)):
        return NotImplemented
    spread: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and _is_mask(index):
            rows = index.new_empty((data_size(index.numel()),), dtype=torch.int64)
            spread += [rows] * index.dim()
        else:
            spread.append(index)
    return _aten.index.Tensor(x, spread)


def _index_put_(x: torch.Tensor, indices: list[torch.Tensor | None], *_: Any) -> Any:
    return x if any(map(_is_mask, indices)) else NotImplemented


def _index_put(x: torch.Tensor, indices: list[torch.Tensor | None], *_: Any) -> Any:
    return torch.empty_like(x) if any(map(_is_mask, indices)) else NotImplemented


BY_DATA: dict[Any, Callable[..., Any]] = {
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: _masked_select,
    _aten.index.Tensor: _index,
    _aten.index_put_.default: _index_put_,
    _aten._index_put_impl_.default: _index_put_,
    _aten.index_put.default: _index_put,
}
"""Ops of which shapes do not tell the shape of the result; NotImplemented leaves a call to torch."""
