"""Shuffles of channels and of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import fixed_dim
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, keeps, modules
from stp_fx.rules.ops._groups import living_groups
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


@rule(
    aten.pixel_shuffle.default,
    calls=[keeps(F.pixel_shuffle)],
    samples=lambda t: arguments(t(2, 12, 3, 5), 2),
    keeps_zero=True,
)
def _pixel_shuffle(call: OpCall) -> None:
    """``.. (c r s) h w -> .. c (h r) (w s)``: the sub-pixels of a channel stay together."""
    dims, factor, out = call.dims(call["self"]), int(call["upscale_factor"]), call.out
    channels, pixels = call.regroup([dims[-3]], [int(out.shape[-3]), factor * factor])
    for dim in (pixels, *dims[-2:]):
        call.pin(dim, "pixel_shuffle moves it into the image")
    call.assign(out, (*dims[:-3], channels, fixed_dim(int(out.shape[-2])), fixed_dim(int(out.shape[-1]))))


@rule(
    aten.pixel_unshuffle.default,
    calls=[keeps(F.pixel_unshuffle)],
    samples=lambda t: arguments(t(2, 3, 4, 6), 2),
    keeps_zero=True,
)
def _pixel_unshuffle(call: OpCall) -> None:
    """``.. c (h r) (w s) -> .. (c r s) h w``."""
    dims, factor = call.dims(call["self"]), int(call["downscale_factor"])
    for dim in dims[-2:]:
        call.pin(dim, "pixel_unshuffle moves image positions into channels")
    call.assign(call.out, (*dims[:-3], dims[-3] + fixed_dim(factor * factor), *(fixed_dim(int(s)) for s in call.out.shape[-2:])))


def _groups(edit: Edit) -> None:
    edit.renew("groups", living_groups(edit, edit.source[1], edit.old("groups")))


def _module(edit: Edit) -> None:
    edit.module.groups = living_groups(edit, edit.source[1], edit.module.groups)


rule(
    aten.channel_shuffle.default,
    aten.native_channel_shuffle.default,
    pattern="n (g c) .. -> n (c g) ..",
    sizes={"g": "groups"},
    calls=[
        edits(_groups, F.channel_shuffle, torch.channel_shuffle, takes="input groups", sizes="groups"),
        modules(_module, nn.ChannelShuffle),
    ],
    samples=lambda t: arguments(t(2, 6, 3, 5), 2),
    keeps_zero=True,
)
