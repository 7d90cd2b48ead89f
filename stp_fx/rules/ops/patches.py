"""Patches of images as columns, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import fixed_dim
from stp_fx.rules.literals import keeps
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


@rule(
    aten.im2col.default,
    calls=[keeps(F.unfold)],
    samples=lambda t: arguments(t(2, 6, 8, 10), [3, 3], [1, 1], [0, 0], [1, 1]),
    keeps_zero=True,
)
def _im2col(call: OpCall) -> None:
    """``.. c h w -> .. (c k) p``: patches ``p`` of ``k`` positions."""
    x = call["self"]
    dims = call.dims(x)
    for dim in dims[-2:]:
        call.pin(dim, "unfold mixes spatial positions")
    kernel = int(call.out.shape[-2]) // int(x.shape[-3])
    call.assign(call.out, (*dims[:-3], dims[-3] + fixed_dim(kernel), fixed_dim(int(call.out.shape[-1]))))


@rule(
    aten.col2im.default,
    calls=[keeps(F.fold)],
    samples=lambda t: arguments(t(2, 54, 48), [8, 10], [3, 3], [1, 1], [0, 0], [1, 1]),
    keeps_zero=True,
)
def _col2im(call: OpCall) -> None:
    """``.. (c k) p -> .. c h w``."""
    x, out = call["self"], call.out
    dims = call.dims(x)
    channels, kernel = call.regroup([dims[-2]], [int(out.shape[-3]), int(x.shape[-2]) // int(out.shape[-3])])
    call.pin(kernel, "fold sums the positions inside a patch")
    call.pin(dims[-1], "fold mixes spatial positions")
    call.assign(out, (*dims[:-2], channels, fixed_dim(int(out.shape[-2])), fixed_dim(int(out.shape[-1]))))
