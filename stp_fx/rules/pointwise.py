"""Pointwise ops need no entry: torch tags them. Broadcasting aligns from the right."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.rules.domain import Context, Dim, Dims, fixed_dim
from stp_fx.rules.registry import rule
from stp_fx.rules.schema import tensors_in

__all__ = ["is_pointwise", "pointwise"]

_ROLES = {"mul": "scale", "div": "scale", "add": "bias", "sub": "bias"}


def is_pointwise(func: Any) -> bool:
    """Whether torch tags an op overload as working on each position by itself."""
    return torch.Tag.pointwise in func.tags


def pointwise(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Every operand's dimension that is as long as the result's lives and dies with it."""
    operands = tensors_in(args) + tensors_in(kwargs)
    outs = tensors_in(out)
    role = _ROLES.get(func.__name__.split(".")[0].rstrip("_"), "other")
    for operand in operands:
        ctx.reads(operand, role, None, None)
    for tensor in outs:
        ctx.assign(tensor, broadcast(ctx, operands, tuple(tensor.shape)))


def broadcast(ctx: Context, operands: list[torch.Tensor], shape: tuple[int, ...]) -> Dims:
    """The joined factors of operands that broadcast to ``shape``."""
    rank = len(shape)
    result: list[Dim] = [() for _ in shape]
    seen = [False] * rank
    for operand in operands:
        dims = ctx.dims(operand)
        for k in range(1, min(operand.dim(), rank) + 1):
            at = rank - k
            if shape[at] == 1 or operand.shape[-k] != shape[at]:
                continue
            result[at] = ctx.unify(result[at], dims[-k]) if seen[at] else dims[-k]
            seen[at] = True
    return tuple(dim if seen[k] else fixed_dim(shape[k]) for k, dim in enumerate(result))


def _same(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Results have the first operand's factors: copies, casts, dropout, fills."""
    for tensor in tensors_in(out):
        if tensor.shape == args[0].shape:
            ctx.assign(tensor, ctx.dims(args[0]))


rule(
    "aten.clone.default",
    "aten.detach.default",
    "aten.alias.default",
    "aten._to_copy.default",
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
    "aten.lift.default",
    "aten.contiguous.default",
    "aten.native_dropout.default",
    "aten.bernoulli.default",
    "aten.bernoulli.p",
    "aten.bernoulli_.float",
    "aten.fill_.Scalar",
    "aten.fill.Scalar",
    "aten.zero_.default",
    "aten.zeros_like.default",
    "aten.ones_like.default",
    "aten.full_like.default",
    "aten.empty_like.default",
    "aten.rand_like.default",
    "aten.randn_like.default",
    "aten.normal_.default",
    "aten.uniform_.default",
    "aten.detach_.default",
)(_same)


@rule(
    "aten.copy_.default",
    "aten.copy.default",
    "aten._prelu_kernel.default",
    "aten.masked_fill.Scalar",
    "aten.masked_fill_.Scalar",
    "aten.masked_fill.Tensor",
    "aten.masked_fill_.Tensor",
    "aten.rrelu_with_noise.default",
)
def _joined(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    pointwise(ctx, func, args, kwargs, out)
