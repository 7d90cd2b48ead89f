"""Views: the same positions seen in another order or cut at other places."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stp_fx.rules.domain import Context, Dim, dim_size, fixed_dim, has_ids
from stp_fx.rules.registry import rule

__all__: list[str] = []


@rule("aten.view.default", "aten._unsafe_view.default", "aten._reshape_alias.default", "aten.reshape.default")
def _view(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    ctx.assign(out, ctx.regroup(ctx.dims(args[0]), tuple(int(s) for s in out.shape)))


@rule("aten.permute.default")
def _permute(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = ctx.dims(args[0])
    ctx.assign(out, tuple(dims[k % len(dims)] for k in args[1]))


@rule("aten.transpose.int", "aten.transpose_.default")
def _transpose(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = list(ctx.dims(args[0]))
    if dims:
        a, b = args[1] % len(dims), args[2] % len(dims)
        dims[a], dims[b] = dims[b], dims[a]
    ctx.assign(out, tuple(dims))


@rule("aten.t.default")
def _t(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    ctx.assign(out, tuple(reversed(ctx.dims(args[0]))))


@rule("aten.unsqueeze.default", "aten.unsqueeze_.default")
def _unsqueeze(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = list(ctx.dims(args[0]))
    dims.insert(args[1] % (out.dim()), ())
    ctx.assign(out, tuple(dims[: out.dim()]))


@rule("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze_.dim", "aten.squeeze_.default")
def _squeeze(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    source = args[0]
    if len(args) == 1:
        gone = set(range(len(ctx.dims(source))))
    else:
        wanted = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        gone = {k % max(len(ctx.dims(source)), 1) for k in wanted}
    ctx.assign(out, tuple(dim for k, dim in enumerate(ctx.dims(source)) if k not in gone or dim_size(dim) != 1))


@rule("aten.expand.default")
def _expand(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = ctx.dims(args[0])
    lead = out.dim() - len(dims)
    result: list[Dim] = []
    for k, size in enumerate(int(s) for s in out.shape):
        old = dims[k - lead] if k >= lead else ()
        result.append(old if dim_size(old) == size else ctx.literal_axis(size, f"expanded to {size}"))
    ctx.assign(out, tuple(result))


@rule("aten.repeat.default")
def _repeat(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims, times = ctx.dims(args[0]), [int(r) for r in args[1]]
    lead = len(times) - len(dims)
    result: list[Dim] = []
    for k, count in enumerate(times):
        old = dims[k - lead] if k >= lead else ()
        if count == 1:
            result.append(old)
        elif dim_size(old) == 1:
            result.append(ctx.literal_axis(count, f"repeated {count} times"))
        elif has_ids(old):
            result.append(ctx.positions(np.tile(ctx.flat(old), count)))
        else:
            result.append(fixed_dim(dim_size(old) * count))
    ctx.assign(out, tuple(result))


@rule("aten.diagonal.default", "aten.as_strided.default", "aten.unfold.default", "aten.tril.default", "aten.triu.default")
def _by_position(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """The result depends on absolute positions along the dimensions it touches."""
    dims = ctx.dims(args[0])
    name = func.__name__.split(".")[0]
    if name in ("tril", "triu"):
        touched = {len(dims) - 2, len(dims) - 1}
    elif name == "unfold":
        touched = {args[1] % len(dims)}
    else:
        touched = set(range(len(dims)))
    for k in touched:
        if has_ids(dims[k]):
            ctx.pin(dims[k], f"{name} reads absolute positions along it")
    kept = [dim if k not in touched else fixed_dim(int(out.shape[k])) for k, dim in enumerate(dims) if k < out.dim()]
    ctx.assign(out, tuple(kept) + tuple(fixed_dim(int(s)) for s in out.shape[len(kept) :]))


@rule("aten.as_strided_.default")
def _restride(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """Pooling to one position lays its result out anew this way: the same shape is the same positions."""
    dims = ctx.dims(args[0])
    if tuple(dim_size(dim) for dim in dims) == tuple(out.shape):
        ctx.assign(out, dims)
        return
    for dim in dims:
        ctx.pin(dim, "as_strided_ reads absolute positions")
    ctx.assign(out, tuple(fixed_dim(int(size)) for size in out.shape))
