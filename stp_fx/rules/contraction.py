"""Contractions: matrix products, convolutions, distances. The letters' sizes are also their cost (multiply-accumulates)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stp_fx.rules.domain import Context, Dim
from stp_fx.rules.notation import parse
from stp_fx.rules.registry import apply_pattern, letters_of, rule

__all__ = ["contract_pattern"]

_WEIGHT_IN_OUT = ("weight", 1, 0)
"""``k n``: a matrix read as [in, out], as ``aten.t`` leaves a Linear's weight."""


def contract_pattern(
    ctx: Context,
    pattern: str,
    inputs: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    *,
    sizes: Mapping[str, int] | None = None,
    roles: Mapping[int, tuple[str, int | None, int | None]] | None = None,
    multiplier: int = 1,
) -> dict[str, Dim]:
    """Applies a pattern and records its contraction: ``multiplier`` x the product of all letters."""
    letters = apply_pattern(ctx, pattern, inputs, [out], sizes, roles)
    parsed = parse(pattern)
    ctx.contract(
        [letters[k] for k in letters_of(parsed) if k in letters],
        [letters[k] for k in parsed.contracted if k in letters],
        multiplier,
    )
    return letters


@rule("aten.mm.default")
def _mm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    contract_pattern(ctx, "m k, k n -> m n", args[:2], out, roles={0: ("weight", 0, 1), 1: _WEIGHT_IN_OUT})


@rule("aten.addmm.default")
def _addmm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    contract_pattern(ctx, "m k, k n -> m n", args[1:3], out, roles={0: ("weight", 0, 1), 1: _WEIGHT_IN_OUT})
    _add_bias(ctx, args[0], out)


@rule("aten.bmm.default")
def _bmm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    contract_pattern(ctx, "b m k, b k n -> b m n", args[:2], out, roles={0: ("weight", 1, 2), 1: ("weight", 2, 1)})


@rule("aten.baddbmm.default")
def _baddbmm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    contract_pattern(ctx, "b m k, b k n -> b m n", args[1:3], out, roles={0: ("weight", 1, 2), 1: ("weight", 2, 1)})
    _add_bias(ctx, args[0], out)


@rule("aten.mv.default")
def _mv(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    contract_pattern(ctx, "m k, k -> m", args[:2], out, roles={0: ("weight", 0, 1)})


@rule("aten.dot.default", "aten.vdot.default")
def _dot(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    contract_pattern(ctx, "k, k -> ", args[:2], out)


@rule("aten._cdist_forward.default", "aten._euclidean_dist.default")
def _cdist(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    contract_pattern(ctx, ".. m k, .. n k -> .. m n", args[:2], out, multiplier=0)


@rule("aten.convolution.default", "aten._convolution.default")
def _convolution(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    kernel = math.prod(weight.shape[2:])
    depthwise = groups > 1 and groups == x.shape[1]
    if transposed:
        pattern, spatial = "n (g c) *, (g c) o *, (g o) -> n (g o) *", math.prod(x.shape[2:])
        role = ("weight", 0 if depthwise else 1, 0)
    else:
        pattern, spatial = "n (g c) *, (g o) c *, (g o) -> n (g o) *", math.prod(out.shape[2:])
        role = ("weight", 0, 0 if depthwise else 1)
    roles = {1: role, 2: ("bias", None, None)}
    contract_pattern(ctx, pattern, [x, weight, bias], out, sizes={"g": groups}, roles=roles, multiplier=kernel * spatial)


@rule("aten._trilinear.default")
def _trilinear(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """``sum over sumdim of i1 * i2 * i3``, each with dimensions of size one put in: nn.Bilinear."""
    expanded: list[list[Dim]] = []
    for tensor, expand in zip(args[:3], args[3:6], strict=True):
        dims = list(ctx.dims(tensor))
        for position in sorted(expand):
            dims.insert(position, ())
        expanded.append(dims)
    joined: list[Dim] = []
    for column in zip(*expanded, strict=True):
        present = [dim for dim in column if dim]
        dim = present[0] if present else ()
        for other in present[1:]:
            dim = ctx.unify(dim, other)
        joined.append(dim)
    ctx.reads(args[1], "weight", 0, None)
    ctx.contract(joined, [joined[k] for k in args[6]], 1)
    ctx.assign(out, tuple(dim for k, dim in enumerate(joined) if k not in args[6]))


def _add_bias(ctx: Context, bias: torch.Tensor, out: torch.Tensor) -> None:
    """A term that broadcasts against the product, from the right."""
    dims = list(ctx.dims(out))
    for k, dim in enumerate(reversed(ctx.dims(bias)), start=1):
        if bias.shape[-k] == out.shape[-k] and out.shape[-k] > 1:
            dims[-k] = ctx.unify(dims[-k], dim)
    ctx.reads(bias, "bias", None, None)
    ctx.assign(out, tuple(dims))
