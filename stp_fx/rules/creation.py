"""New tensors: sizes written in the graph are axes of their own; ranges count positions and are fixed."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.rules.domain import Context, fixed_dims
from stp_fx.rules.registry import rule
from stp_fx.rules.schema import tensors_in

__all__: list[str] = []


@rule(
    "aten.zeros.default",
    "aten.ones.default",
    "aten.full.default",
    "aten.empty.memory_format",
    "aten.rand.default",
    "aten.randn.default",
    "aten.new_zeros.default",
    "aten.new_ones.default",
    "aten.new_full.default",
    "aten.new_empty.default",
    "aten.empty_strided.default",
    "aten.new_empty_strided.default",
)
def _create(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    name = func.__name__.split(".")[0]
    ctx.assign(out, tuple(ctx.literal_axis(int(size), f"{name} of size {int(size)}") if size > 1 else () for size in out.shape))


@rule(
    "aten.arange.default",
    "aten.arange.start",
    "aten.arange.start_step",
    "aten.linspace.default",
    "aten.eye.default",
    "aten.eye.m",
    "aten.scalar_tensor.default",
    "aten.randint.default",
    "aten.randint.low",
    "aten.randperm.default",
    "aten.tril_indices.default",
    "aten.triu_indices.default",
)
def _range(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    ctx.assign(out, fixed_dims(out.shape))


@rule(
    "aten._assert_async.default",
    "aten._assert_async.msg",
    "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
    "aten._functional_assert_async.msg",
)
def _assertion(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Assertions touch nothing and must not pin."""
    for tensor in tensors_in(out):
        ctx.assign(tensor, ctx.dims(tensor))
