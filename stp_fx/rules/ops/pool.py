"""Pooling, resizing and padding of images: channels pass, spatial positions do not map one to one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stp_fx.rules.literals import PythonCalls, keeps
from stp_fx.rules.mapping import tensor_results
from stp_fx.rules.registry import overload_of, overloads, rule
from stp_fx.rules.samples import Sample, arguments

__all__: list[str] = []

aten = torch.ops.aten

_SIDE = {1: ".. _", 2: ".. _ _", 3: ".. _ _ _"}
_SHAPE = {1: (2, 6, 8), 2: (2, 6, 8, 10), 3: (2, 6, 4, 8, 10)}
_RESIZED = {1: [9], 2: [9, 11], 3: [5, 9, 11]}


def _resize(rank: int, *ops: Any, calls: tuple[PythonCalls, ...] = (), samples: Sample) -> None:
    """Ops over the last ``rank`` dimensions of one tensor."""
    side = _SIDE[rank]
    for op in map(overload_of, ops):
        rule(
            op, pattern=f"{side} -> {', '.join([side] * len(tensor_results(op)))}", calls=calls, samples=samples, keeps_zero=True
        )
        calls = ()


_CALLS = {
    1: (keeps(F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d),),
    2: (keeps(F.interpolate, F.lp_pool2d, F.local_response_norm),),
    3: (),
}
_POOLS = {
    1: overloads("aten.max_pool1d_with_indices.default", "aten.avg_pool1d.default"),
    2: (aten.max_pool2d_with_indices.default, aten.avg_pool2d.default),
    3: (aten.max_pool3d_with_indices.default, aten.avg_pool3d.default),
}
_ADAPTIVE = {
    1: (aten.adaptive_avg_pool1d.default,),
    2: (aten._adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default),
    3: (aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool3d.default),
}
_LINEAR = {1: aten.upsample_linear1d.default, 2: aten.upsample_bilinear2d.default, 3: aten.upsample_trilinear3d.default}

for _rank, _shape in _SHAPE.items():
    _resize(_rank, *_POOLS[_rank], calls=_CALLS[_rank], samples=lambda t, s=_shape, r=_rank: arguments(t(*s), [2] * r, [2] * r))
    _resize(_rank, *_ADAPTIVE[_rank], samples=lambda t, s=_shape, r=_rank: arguments(t(*s), [2] * r))
    _resize(
        _rank,
        *(f"aten.reflection_pad{_rank}d.default", f"aten.replication_pad{_rank}d.default"),
        samples=lambda t, s=_shape, r=_rank: arguments(t(*s), [1, 1] * r),
    )
    _resize(
        _rank,
        *(f"aten.upsample_nearest{_rank}d.default", f"aten._upsample_nearest_exact{_rank}d.default"),
        samples=lambda t, s=_shape, o=_RESIZED[_rank]: arguments(t(*s), o),
    )
    _resize(_rank, _LINEAR[_rank], samples=lambda t, s=_shape, o=_RESIZED[_rank]: arguments(t(*s), o, False))
_resize(
    2,
    *(aten._upsample_bilinear2d_aa.default, aten.upsample_bicubic2d.default, aten._upsample_bicubic2d_aa.default),
    samples=lambda t: arguments(t(2, 6, 8, 10), [9, 11], False),
)

rule(
    aten.fractional_max_pool2d.default,
    pattern=".. _ _, * -> .. _ _, .. _ _",
    samples=lambda t: arguments(t(2, 6, 8, 10), [2, 2], [3, 4], t(2, 6, 2)),
)
rule(
    aten.max_unpool2d.default,
    pattern=".. _ _, .. _ _ -> .. _ _",  # the indices are those of each channel by itself
    samples=lambda t: arguments(t(2, 6, 4, 5), t(2, 6, 4, 5, dtype=torch.int64, below=80), [8, 10]),
)
rule(
    aten.max_unpool3d.default,
    pattern=".. _ _ _, .. _ _ _ -> .. _ _ _",
    samples=lambda t: arguments(
        t(2, 6, 2, 4, 5), t(2, 6, 2, 4, 5, dtype=torch.int64, below=320), [4, 8, 10], [2, 2, 2], [0, 0, 0]
    ),
)

rule(
    aten.grid_sampler_2d.default,
    pattern="n c *, n * -> n c *",
    samples=lambda t: arguments(t(2, 6, 8, 10), t(2, 5, 7, 2), 0, 0, False),
)
rule(
    aten.grid_sampler_3d.default,
    pattern="n c *, n * -> n c *",
    samples=lambda t: arguments(t(2, 6, 4, 8, 10), t(2, 3, 5, 7, 3), 0, 0, False),
)
