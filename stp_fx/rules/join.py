"""Joins and pieces: they move element ids, so any permutation, piece or concatenation is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stp_fx.rules.domain import FIXED, Context, Dim, Factor, dim_size, fixed_dim, has_ids
from stp_fx.rules.registry import rule
from stp_fx.rules.schema import bound

__all__: list[str] = []


def _piece(ctx: Context, dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    """Positions ``start:stop:step`` of a dimension."""
    length = len(range(start, stop, step))
    if length == dim_size(dim):
        return dim
    if not has_ids(dim):
        return fixed_dim(length)
    if not ctx.editable or step != 1:
        ctx.pin(dim, "a piece of it is taken " + ("in steps" if step != 1 else "where the graph cannot be rewritten"))
        return fixed_dim(length)
    outer, *rest = dim
    inner = math.prod(factor.size for factor in rest)
    if inner > 1 and start % inner == 0 and length % inner == 0 and length > inner:
        ids = None if outer.ids is None else outer.ids[start // inner : stop // inner]
        return (Factor(length // inner, ids), *rest)
    return ctx.positions(ctx.flat(dim)[start:stop])


@rule("aten.slice.Tensor")
def _slice(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    values = bound(func, args, kwargs)
    source, step = values["self"], int(values["step"])
    dims = list(ctx.dims(source))
    at = values["dim"] % len(dims)
    start, stop, _ = slice(values["start"], values["end"], step).indices(int(source.shape[at]))
    dims[at] = _piece(ctx, dims[at], start, max(stop, start), step)
    ctx.assign(out, tuple(dims))


@rule("aten.split.Tensor", "aten.split_with_sizes.default", "aten.unsafe_split.Tensor", "aten.unsafe_split_with_sizes.default")
def _split(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[torch.Tensor]) -> None:
    dims = ctx.dims(args[0])
    at = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(dims)
    start = 0
    for tensor in out:
        stop = start + int(tensor.shape[at])
        ctx.assign(tensor, (*dims[:at], _piece(ctx, dims[at], start, stop), *dims[at + 1 :]))
        start = stop


@rule("aten.glu.default")
def _glu(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """First half gated by the second: both halves of the dimension go together."""
    dims = ctx.dims(args[0])
    at = (args[1] if len(args) > 1 else -1) % len(dims)
    half = int(out.shape[at])
    flat = ctx.flat(dims[at]) if has_ids(dims[at]) else None
    joined = fixed_dim(half) if flat is None else ctx.unify(ctx.positions(flat[:half]), ctx.positions(flat[half:]))
    ctx.assign(out, (*dims[:at], joined, *dims[at + 1 :]))


@rule("aten.select.int")
def _select(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = ctx.dims(args[0])
    at = args[1] % len(dims)
    if has_ids(dims[at]):
        if ctx.editable:
            flat = ctx.flat(dims[at])
            ctx.pin((Factor(1, flat[args[2] : args[2] + 1 or None]),), f"select takes position {args[2]}")
        else:
            ctx.pin(dims[at], f"select takes position {args[2]}")
    ctx.assign(out, dims[:at] + dims[at + 1 :])


@rule("aten.unbind.int")
def _unbind(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[torch.Tensor]) -> None:
    dims = ctx.dims(args[0])
    at = (args[1] if len(args) > 1 else 0) % len(dims)
    ctx.pin(dims[at], "unbind makes one tensor of each position")
    for tensor in out:
        ctx.assign(tensor, dims[:at] + dims[at + 1 :])


@rule("aten.cat.default")
def _cat(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    tensors = [t for t in args[0] if t.dim() == out.dim()]
    at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    columns = [ctx.dims(t) for t in tensors]
    result: list[Dim] = []
    for k in range(out.dim()):
        if k == at:
            result.append(_joined(ctx, [dims[k] for dims in columns], [int(t.shape[k]) for t in tensors]))
            continue
        dim = columns[0][k]
        for dims in columns[1:]:
            dim = ctx.unify(dim, dims[k])
        result.append(dim)
    ctx.assign(out, tuple(result))


def _joined(ctx: Context, dims: list[Dim], sizes: list[int]) -> Dim:
    if len(dims) == 1:
        return dims[0]
    if not any(has_ids(dim) for dim in dims):
        return fixed_dim(sum(sizes))
    flat = [ctx.flat(dim) if dim else np.full(size, FIXED) for dim, size in zip(dims, sizes, strict=True)]
    return ctx.positions(np.concatenate(flat))


@rule("aten.stack.default")
def _stack(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    tensors = args[0]
    at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    dims = list(ctx.dims(tensors[0]))
    for tensor in tensors[1:]:
        dims = [ctx.unify(a, b) for a, b in zip(dims, ctx.dims(tensor), strict=True)]
    dims.insert(at, fixed_dim(len(tensors)))
    ctx.assign(out, tuple(dims))


@rule("aten.flip.default")
def _flip(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = list(ctx.dims(args[0]))
    for at in {k % len(dims) for k in args[1]}:
        if has_ids(dims[at]):
            dims[at] = ctx.positions(ctx.flat(dims[at])[::-1])
    ctx.assign(out, tuple(dims))


@rule("aten.roll.default")
def _roll(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = list(ctx.dims(args[0]))
    shifts, along = args[1], (args[2] if len(args) > 2 else [])
    if not along:
        for dim in dims:
            ctx.pin(dim, "roll without dims moves positions across dimensions")
    for shift, k in zip(shifts, along, strict=False):
        at = k % len(dims)
        if has_ids(dims[at]):
            if not ctx.editable:
                ctx.pin(dims[at], "rolled where the graph cannot be rewritten")
            else:
                dims[at] = ctx.positions(np.roll(ctx.flat(dims[at]), shift))
    ctx.assign(out, tuple(dims))


@rule("aten.constant_pad_nd.default")
def _pad(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """Padding channels are elements of their own; a negative amount cuts."""
    dims = list(ctx.dims(args[0]))
    amounts = [int(a) for a in args[1]]
    for pair in range(len(amounts) // 2):
        at, left, right = len(dims) - 1 - pair, amounts[2 * pair], amounts[2 * pair + 1]
        if left == 0 and right == 0:
            continue
        if not has_ids(dims[at]):
            dims[at] = fixed_dim(int(out.shape[at]))
            continue
        if not ctx.editable:
            ctx.pin(dims[at], "padded where the graph cannot be rewritten")
            dims[at] = fixed_dim(int(out.shape[at]))
            continue
        flat = ctx.flat(dims[at])
        flat = flat[max(-left, 0) : len(flat) - max(-right, 0)]
        dims[at] = ctx.positions(np.concatenate([_fresh(ctx, left), flat, _fresh(ctx, right)]))
    ctx.assign(out, tuple(dims))


def _fresh(ctx: Context, amount: int) -> np.ndarray:
    if amount <= 0:
        return np.empty(0, dtype=np.int64)
    axis = ctx.literal_axis(amount, f"{amount} padding channels")
    return ctx.flat(axis) if axis else np.full(1, FIXED)
