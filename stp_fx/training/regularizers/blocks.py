"""Sums over weights, and products with them, in blocks: what is computed in between stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Factor", "blocks", "square_sums"]

_BLOCK = 1 << 16
"""Elements in a block, on a CPU."""


def blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension; a single one where there is no cache to stay in."""
    step = len(weight)
    if weight.device.type == "cpu" and weight.numel():
        step = max(1, _BLOCK * len(weight) // weight.numel())
    for start in range(0, len(weight), max(step, 1)):
        yield slice(start, start + step)


class Factor:
    """The sum or the product (``combine``) of one vector along each of some dimensions of ``weight``.

    It is kept as two parts that broadcast over the weight: along its first dimension, and across all others, in their memory
    format.
    """

    def __init__(self, weight: torch.Tensor, combine: Callable[..., torch.Tensor], vectors: Mapping[int, torch.Tensor]) -> None:
        self._parts = [] if 0 not in vectors else [vectors[0].reshape([-1, *[1] * (weight.dim() - 1)])]
        self._along = 0 in vectors
        self._combine = combine
        across = None
        for dim, vector in vectors.items():
            if dim > 0:
                shaped = vector.reshape([-1 if k == dim else 1 for k in range(1, weight.dim())])
                across = shaped if across is None else combine(across, shaped)
        if across is not None:
            self._parts.append(torch.empty_like(_slice_of(weight), dtype=across.dtype).copy_(across))

    def of(self, block: slice) -> torch.Tensor:
        """The factor of ``weight[block]``."""
        along, across = self._parts[0], self._parts[-1]
        if not self._along:
            return across
        return along[block] if len(self._parts) == 1 else self._combine(along[block], across)


def square_sums(
    weight: torch.Tensor, dims: Sequence[int], dtype: torch.dtype, keep: Factor | None = None
) -> tuple[torch.Tensor, ...]:
    """For each of ``dims``: the sum of squares of ``weight`` over all other dimensions, in ``dtype``, differentiable.

    With ``keep``, of the weight times that (zeros and ones).
    """
    return _SquareSums.apply(weight, tuple(dims), dtype, keep)  # type: ignore[return-value]


class _SquareSums(torch.autograd.Function):
    """A function of its own, so that autograd keeps no squares."""

    @staticmethod
    def forward(weight: torch.Tensor, dims: tuple[int, ...], dtype: torch.dtype, keep: Factor | None) -> tuple[torch.Tensor, ...]:
        along = weight.new_empty(len(weight), dtype=dtype)
        across = torch.zeros_like(_slice_of(weight), dtype=dtype)
        for block in blocks(weight):
            part = weight[block].to(dtype)
            squares = (part if keep is None else part * keep.of(block)).square()
            if 0 in dims:
                along[block] = _summed(squares, 0)
            if dims != (0,):
                across += squares.sum(0)
        return tuple(along if dim == 0 else _summed(across, dim - 1) for dim in dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, ctx.dims, ctx.dtype, ctx.keep = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        scale = Factor(weight, torch.add, {dim: 2 * grad for dim, grad in zip(ctx.dims, grads, strict=True)})
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            wide = weight.to(ctx.dtype) * scale.of(slice(None))
            return (wide if ctx.keep is None else wide * ctx.keep.of(slice(None))).to(weight.dtype), None, None, None
        result = torch.empty_like(weight)
        for block in blocks(weight):
            part = weight[block].to(ctx.dtype)
            torch.mul(part if ctx.keep is None else part * ctx.keep.of(block), scale.of(block), out=result[block])
        return result, None, None, None


def _slice_of(weight: torch.Tensor) -> torch.Tensor:
    """Something of the shape and the memory format of ``weight[0]``."""
    return weight[0] if len(weight) else weight.sum(0)


def _summed(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Summed over all dimensions but ``dim``."""
    others = [k for k in range(values.dim()) if k != dim]
    return values.sum(others) if others else values
