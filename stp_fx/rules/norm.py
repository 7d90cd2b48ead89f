"""Normalisations, softmax and reductions: what they average over is not the same masked as removed, and they say so."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.rules.domain import Context, fixed_dim, has_ids
from stp_fx.rules.registry import apply_pattern, rule
from stp_fx.rules.schema import bound, dim_list

__all__: list[str] = []

_BN_ROLES = {1: ("scale", None, None), 2: ("bias", None, None), 3: ("buffer", None, None), 4: ("buffer", None, None)}


@rule(
    "aten.native_batch_norm.default",
    "aten._native_batch_norm_legit.default",
    "aten._native_batch_norm_legit_no_training.default",
    "aten._batch_norm_with_update.default",
    "aten._batch_norm_no_update.default",
    "aten.cudnn_batch_norm.default",
    "aten.miopen_batch_norm.default",
)
def _batch_norm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if func is torch.ops.aten._batch_norm_with_update.default or (len(args) > 5 and args[5] is True):
        _over_all_but_channels(ctx, args[0])
    apply_pattern(ctx, "n c .., c, c, c, c -> n c .., c, c", args[:5], out[:3], roles=_BN_ROLES)


@rule("aten._native_batch_norm_legit.no_stats")
def _batch_norm_no_stats(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    _over_all_but_channels(ctx, args[0])
    apply_pattern(ctx, "n c .., c, c -> n c .., c, c", args[:3], out[:3], roles=_BN_ROLES)


def _over_all_but_channels(ctx: Context, x: torch.Tensor) -> None:
    """With statistics of the batch: of a weight in place of a batch (weight standardisation), they are over its inputs."""
    for position, dim in enumerate(ctx.dims(x)):
        if position != 1:
            ctx.inexact(dim, "batch_norm normalises over it")


@rule("aten.native_layer_norm.default", "aten._fused_rms_norm.default", "aten.rms_norm.default")
def _layer_norm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, shape = args[0], args[1]
    dims = list(ctx.dims(x))
    first = len(dims) - len(shape)
    for position, role in ((2, "scale"), (3, "bias")):
        tensor = args[position] if position < len(args) else None
        if isinstance(tensor, torch.Tensor):
            dims[first:] = [ctx.unify(a, b) for a, b in zip(dims[first:], ctx.dims(tensor), strict=True)]
            ctx.reads(tensor, role, None, None)
    for dim in dims[first:]:
        ctx.inexact(dim, f"{func.__name__.split('.')[0]} normalises over it")
    outs = out if isinstance(out, (tuple, list)) else (out,)
    ctx.assign(outs[0], tuple(dims))
    for rest in outs[1:]:
        if rest.dim() == len(dims):
            ctx.assign(rest, tuple(dims[:first]) + ((),) * len(shape))


@rule("aten.native_group_norm.default")
def _group_norm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    groups = args[6]
    pattern = "n (g c) .., (g c), (g c) -> n (g c) .."
    roles = {1: ("scale", None, None), 2: ("bias", None, None)}
    letters = apply_pattern(ctx, pattern, args[:3], out[:1], sizes={"g": groups, "c": args[4] // groups}, roles=roles)
    ctx.inexact(letters["c"], f"group_norm normalises over the channels inside each of its {groups} groups")


@rule("aten._weight_norm_interface.default")
def _weight_norm(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    v, g = args[0], args[1]
    kept = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % v.dim()
    dims = list(ctx.dims(v))
    if g.shape[kept] == v.shape[kept]:
        dims[kept] = ctx.unify(dims[kept], ctx.dims(g)[kept])
    ctx.reads(g, "scale", None, None)
    for k, dim in enumerate(dims):
        if k != kept:
            ctx.inexact(dim, "weight_norm normalises the weight over it")
    ctx.assign(out[0], tuple(dims))
    ctx.assign(out[1], tuple(dim if k == kept else () for k, dim in enumerate(dims)))


@rule(
    "aten._softmax.default",
    "aten._log_softmax.default",
    "aten._safe_softmax.default",
    "aten.cumprod.default",
    "aten.logcumsumexp.default",
)
def _softmax(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = ctx.dims(args[0])
    if dims:
        ctx.inexact(dims[args[1] % len(dims)], f"{func.__name__.split('.')[0].strip('_')} runs over it")
    ctx.assign(out, dims)


@rule("aten.cumsum.default")
def _cumsum(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """A removed position adds nothing to the later ones: as a sum, it reads zero there."""
    dims = ctx.dims(args[0])
    if dims:
        ctx.contract((), [dims[args[1] % len(dims)]], 0)
    ctx.assign(out, dims)


_ZERO_IS_NEUTRAL = (
    "aten.sum.default",
    "aten.sum.dim_IntList",
    "aten.nansum.default",
    "aten.linalg_vector_norm.default",
    "aten.norm.Scalar",
    "aten.norm.ScalarOpt_dim",
    "aten.any.default",
    "aten.any.dim",
    "aten.any.dims",
    "aten.count_nonzero.dim_IntList",
)

_CHANGES_WITH_LENGTH = (
    "aten.mean.default",
    "aten.mean.dim",
    "aten.amax.default",
    "aten.amin.default",
    "aten.max.default",
    "aten.min.default",
    "aten.max.dim",
    "aten.min.dim",
    "aten.prod.default",
    "aten.prod.dim_int",
    "aten.logsumexp.default",
    "aten.var.correction",
    "aten.std.correction",
    "aten.var_mean.correction",
    "aten.std_mean.correction",
    "aten.all.default",
    "aten.all.dim",
    "aten.median.default",
    "aten.median.dim",
)


@rule(*_ZERO_IS_NEUTRAL, *_CHANGES_WITH_LENGTH)
def _reduce(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Sums and norms read zero where a position is gone; means, extrema and variances are taken over fewer."""
    values = bound(func, args, kwargs)
    dims = ctx.dims(args[0])
    reduced = dim_list(values.get("dim"), len(dims))
    name = str(func)
    for k in reduced:
        if not has_ids(dims[k]):
            continue
        if name in _ZERO_IS_NEUTRAL and not _negative_order(values):
            ctx.contract((), [dims[k]], 0)
        elif "max.dim" in name or "min.dim" in name or "median" in name:
            ctx.pin(dims[k], f"{func.__name__} gives positions along it")
        else:
            ctx.inexact(dims[k], f"{func.__name__.split('.')[0]} reduces over it")
    if values.get("keepdim"):
        result = tuple(() if k in reduced else dim for k, dim in enumerate(dims))
    else:
        result = tuple(dim for k, dim in enumerate(dims) if k not in reduced)
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        ctx.assign(tensor, result)


def _negative_order(values: dict[str, Any]) -> bool:
    """A norm of negative order is led by the smallest entries, so zeros are not neutral."""
    order = values.get("ord", values.get("p"))
    return isinstance(order, (int, float)) and order < 0


@rule(
    "aten.argmax.default",
    "aten.argmin.default",
    "aten.sort.default",
    "aten.sort.stable",
    "aten.argsort.default",
    "aten.topk.default",
    "aten.kthvalue.default",
    "aten.mode.default",
    "aten.cummax.default",
    "aten.cummin.default",
)
def _positions(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Results hold positions along a dimension, so it must keep its numbering."""
    values = bound(func, args, kwargs)
    dims = ctx.dims(args[0])
    along = dim_list(values.get("dim"), len(dims))
    for k in along:
        ctx.pin(dims[k], f"{func.__name__} gives positions along it")
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if tensor.dim() == len(dims):
            ctx.assign(tensor, tuple(fixed_dim(int(tensor.shape[k])) if k in along else dim for k, dim in enumerate(dims)))
        else:
            ctx.assign(tensor, tuple(dim for k, dim in enumerate(dims) if k not in along))
