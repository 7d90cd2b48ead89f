"""Pooling, resizing and patches: channels pass, spatial positions do not map one to one."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.rules.domain import Context, fixed_dim
from stp_fx.rules.registry import apply_pattern, rule

__all__: list[str] = []

_SPATIAL = {1: ".. _", 2: ".. _ _", 3: ".. _ _ _"}


def _outputs(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _register(rank: int, names: list[str]) -> None:
    side = _SPATIAL[rank]

    @rule(*names)
    def _resize(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        outs = _outputs(out)
        apply_pattern(ctx, f"{side} -> " + ", ".join([side] * len(outs)), args[:1], outs)


_register(
    1,
    [
        "aten.max_pool1d_with_indices.default",
        "aten.avg_pool1d.default",
        "aten.adaptive_avg_pool1d.default",
        "aten.reflection_pad1d.default",
        "aten.replication_pad1d.default",
        "aten.upsample_nearest1d.default",
        "aten._upsample_nearest_exact1d.default",
        "aten.upsample_linear1d.default",
    ],
)
_register(
    2,
    [
        "aten.max_pool2d_with_indices.default",
        "aten.avg_pool2d.default",
        "aten._adaptive_avg_pool2d.default",
        "aten.adaptive_max_pool2d.default",
        "aten.fractional_max_pool2d.default",
        "aten.reflection_pad2d.default",
        "aten.replication_pad2d.default",
        "aten.upsample_nearest2d.default",
        "aten._upsample_nearest_exact2d.default",
        "aten.upsample_bilinear2d.default",
        "aten._upsample_bilinear2d_aa.default",
        "aten.upsample_bicubic2d.default",
        "aten._upsample_bicubic2d_aa.default",
        "aten.max_unpool2d.default",
    ],
)
_register(
    3,
    [
        "aten.max_pool3d_with_indices.default",
        "aten.avg_pool3d.default",
        "aten._adaptive_avg_pool3d.default",
        "aten.adaptive_max_pool3d.default",
        "aten.reflection_pad3d.default",
        "aten.replication_pad3d.default",
        "aten.upsample_nearest3d.default",
        "aten._upsample_nearest_exact3d.default",
        "aten.upsample_trilinear3d.default",
    ],
)


@rule("aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def _grid_sampler(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    apply_pattern(ctx, "n c *, n * -> n c *", args[:2], [out])


@rule("aten.im2col.default")
def _im2col(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = ctx.dims(args[0])
    for dim in dims[-2:]:
        ctx.pin(dim, "unfold mixes spatial positions")
    kernel = int(out.shape[-2]) // int(args[0].shape[-3])
    ctx.assign(out, (*dims[:-3], dims[-3] + fixed_dim(kernel), fixed_dim(int(out.shape[-1]))))


@rule("aten.col2im.default")
def _col2im(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims = ctx.dims(args[0])
    channels, kernel = ctx.regroup([dims[-2]], [int(out.shape[-3]), int(args[0].shape[-2]) // int(out.shape[-3])])
    ctx.pin(kernel, "fold sums the positions inside a patch")
    ctx.pin(dims[-1], "fold mixes spatial positions")
    ctx.assign(out, (*dims[:-2], channels, fixed_dim(int(out.shape[-2])), fixed_dim(int(out.shape[-1]))))


@rule("aten.pixel_shuffle.default")
def _pixel_shuffle(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """``n (c r s) h w -> n c (h r) (w s)``: the sub-pixels of a channel stay together."""
    dims, factor = ctx.dims(args[0]), int(args[1])
    channels, pixels = ctx.regroup([dims[-3]], [int(out.shape[-3]), factor * factor])
    for dim in (pixels, *dims[-2:]):
        ctx.pin(dim, "pixel_shuffle moves it into the image")
    ctx.assign(out, (*dims[:-3], channels, fixed_dim(int(out.shape[-2])), fixed_dim(int(out.shape[-1]))))


@rule("aten.pixel_unshuffle.default")
def _pixel_unshuffle(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims, factor = ctx.dims(args[0]), int(args[1])
    for dim in dims[-2:]:
        ctx.pin(dim, "pixel_unshuffle moves image positions into channels")
    ctx.assign(out, (*dims[:-3], dims[-3] + fixed_dim(factor * factor), *(fixed_dim(int(s)) for s in out.shape[-2:])))


@rule("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")
def _channel_shuffle(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """``n (g c) .. -> n (c g) ..``."""
    dims, groups = ctx.dims(args[0]), int(args[1])
    outer, inner = ctx.regroup([dims[1]], [groups, int(out.shape[1]) // groups])
    ctx.assign(out, (dims[0], inner + outer, *dims[2:]))
