"""Ops of torchvision: deformable convolution, pooling of regions. Loaded when a graph has one: torchvision is slow to import."""

from __future__ import annotations

import torch
import torchvision  # noqa: F401 - registers the ops
from torchvision.ops import DeformConv2d, deform_conv2d

from stp_fx.rules.call import OpCall
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import follows, modules
from stp_fx.rules.mapping import BIAS, FactorMapping, weight
from stp_fx.rules.ops._groups import living_groups
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

ops = torch.ops.torchvision


def _taps(call: OpCall) -> int:
    return call["weight"].shape[2:].numel() * call.out.shape[2:].numel()


_DEFORMED = FactorMapping(
    "n (g c) *, (g o) c *, n *, n *, (g o) -> n (g o) *", {1: weight(0, 1), 4: BIAS}, {"g": "groups"}, cost=_taps
)


def _deformable(edit: Edit) -> None:
    module, source = edit.module, edit.source[-3]
    if module.groups > 1:
        module.groups = living_groups(edit, source, module.groups)
    module.in_channels = edit.size(source)
    module.out_channels = edit.size(edit.result_dims()[-3])


@rule(
    ops.deform_conv2d.default,
    calls=[follows(deform_conv2d, ops.deform_conv2d), modules(_deformable, DeformConv2d, takes="input offset mask")],
    samples=lambda t: arguments(t(2, 6, 8, 8), t(4, 6, 3, 3), t(2, 18, 8, 8), t(2, 9, 8, 8), t(4), 1, 1, 1, 1, 1, 1, 1, 1, True),
)
def _deform_conv(call: OpCall) -> None:
    """A convolution whose taps are moved by offsets, of which every tap has its own: those stay."""
    channels = call.dims(call["input"])[1]
    _DEFORMED(call)
    if call["offset_groups"] > 1:
        call.pin(channels, "deform_conv2d: groups of channels have offsets of their own")


rule(
    ops.roi_align.default,
    pattern="_ c *, * -> _ c *",
    samples=lambda t: arguments(t(2, 6, 8, 8), t(3, 5), 1.0, 4, 4, 2, True),
)
rule(
    ops.roi_pool.default,
    pattern="_ c *, * -> _ c *, _ c *",
    samples=lambda t: arguments(t(2, 6, 8, 8), t(3, 5), 1.0, 4, 4),
)
