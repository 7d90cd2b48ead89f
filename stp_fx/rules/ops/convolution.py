"""Convolutions, plain and transposed, grouped and depthwise."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.rules.call import OpCall
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, modules
from stp_fx.rules.mapping import BIAS, FactorMapping, weight
from stp_fx.rules.ops._groups import living_groups
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import Make, arguments

__all__: list[str] = []

aten = torch.ops.aten


def _taps_of_outputs(call: OpCall) -> int:
    return math.prod(call.args[1].shape[2:]) * math.prod(call.out.shape[2:])


def _taps_of_inputs(call: OpCall) -> int:
    return math.prod(call.args[1].shape[2:]) * math.prod(call.args[0].shape[2:])


PLAIN = FactorMapping(
    "n (g c) *, (g o) c *, (g o) -> n (g o) *", {1: weight(0, 1), 2: BIAS}, {"g": "groups"}, cost=_taps_of_outputs
)
TRANSPOSED = FactorMapping(
    "n (g c) *, (g c) o *, (g o) -> n (g o) *", {1: weight(1, 0), 2: BIAS}, {"g": "groups"}, cost=_taps_of_inputs
)
DEPTHWISE = dataclasses.replace(PLAIN, roles={1: weight(0, 0), 2: BIAS})
DEPTHWISE_TRANSPOSED = dataclasses.replace(TRANSPOSED, roles={1: weight(0, 0), 2: BIAS})


def _conv(edit: Edit) -> None:
    groups = edit.old("groups", 1)
    if groups > 1 and edit.changed(edit.source[1]):
        edit.renew("groups", living_groups(edit, edit.source[1], groups))


def _module(edit: Edit) -> None:
    module = edit.module
    rank = len(module.kernel_size) + 1  # channels come before the spatial dimensions, batched or not
    source = edit.source[-rank]
    if module.groups > 1:
        module.groups = living_groups(edit, source, module.groups)
    module.in_channels = edit.size(source)
    module.out_channels = edit.size(edit.result_dims()[-rank])


_CALLS = [
    edits(
        _conv,
        *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
        takes="input weight bias stride padding dilation groups",
        sizes="groups",
    ),
    edits(
        _conv,
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        takes="input weight bias stride padding output_padding groups dilation",
        sizes="groups",
    ),
    modules(_module, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
]


def _map(call: OpCall) -> None:
    groups = call["groups"]
    depthwise = groups > 1 and groups == call["input"].shape[1]
    if call["transposed"]:
        (DEPTHWISE_TRANSPOSED if depthwise else TRANSPOSED)(call)
    else:
        (DEPTHWISE if depthwise else PLAIN)(call)


def _grouped(t: Make, *more: bool):
    return arguments(t(2, 6, 5, 7), t(4, 3, 3, 3), t(4), [1, 1], [0, 0], [1, 1], False, [0, 0], 2, *more)


def _transposed(t: Make, *more: bool):
    return arguments(t(2, 6, 5, 7), t(6, 2, 3, 3), t(4), [1, 1], [0, 0], [1, 1], True, [0, 0], 2, *more)


def _depthwise(t: Make, *more: bool):
    return arguments(t(2, 6, 5, 7), t(12, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 6, *more)


rule(
    aten.convolution.default,
    calls=_CALLS,
    samples={"": _grouped, "transposed": _transposed, "depthwise": _depthwise},
)(_map)

rule(aten._convolution.default, samples=lambda t: _depthwise(t, False, False, True, True))(_map)
