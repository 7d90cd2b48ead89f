"""Normalisations. Removing from an axis that an op averages over is not masking it, and the entries mark such axes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.rules.call import OpCall
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, follows, modules
from stp_fx.rules.mapping import BIAS, BUFFER, SCALE, FactorMapping, tensor_results
from stp_fx.rules.ops._groups import living_groups
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import Make, arguments

__all__: list[str] = []

aten = torch.ops.aten

# -- batch and instance norm ---------------------------------------------------------------------------------------------

_BN_ROLES = {1: SCALE, 2: BIAS, 3: BUFFER, 4: BUFFER}


@functools.cache
def _batch_norm_mapping(op: Any) -> FactorMapping:
    """Beside the statistics, some forms give a reserve that carries no channels."""
    more = ", *" * (len(tensor_results(op)) - 3)
    return FactorMapping(f"n c .., c, c, c, c -> n c .., c, c{more}", _BN_ROLES)


def _batch_norm_shape(x: torch.Tensor, *_: Any, **__: Any) -> Any:
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def _batch_norm_module(edit: Edit) -> None:
    edit.module.num_features = edit.size(edit.result_dims()[1])


def _instance_norm_module(edit: Edit) -> None:
    rank = {"1": 2, "2": 3, "3": 4}[type(edit.module).__name__[-2]]
    edit.module.num_features = edit.size(edit.result_dims()[-rank])


def _bn(t: Make, *more: Any):
    return arguments(t(2, 6, 5, 7), t(6), t(6), t(6), t(6), *more, 0.1, 1e-5)


def _over_all_but_channels(call: OpCall) -> None:
    """With statistics of the batch: of a weight in place of a batch (weight standardisation), they are over its inputs."""
    for position, dim in enumerate(call.dims(call["input"])):
        if position != 1:
            call.inexact(dim, "batch_norm normalises over it")


def _batch_norm(call: OpCall) -> None:
    if call.get("training", True):
        _over_all_but_channels(call)
    _batch_norm_mapping(call.func)(call)


rule(
    aten.native_batch_norm.default,
    calls=[
        follows(F.batch_norm, F.instance_norm),
        modules(_batch_norm_module, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        modules(_instance_norm_module, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ],
    samples=lambda t: _bn(t, False),
    shape=_batch_norm_shape,
)(_batch_norm)
rule(aten._native_batch_norm_legit.default, samples=lambda t: _bn(t, False))(_batch_norm)
rule(*overloads("aten._batch_norm_with_update.default"), samples=_bn)(_batch_norm)
rule(
    *overloads("aten.cudnn_batch_norm.default", "aten.miopen_batch_norm.default"),
    samples=lambda t: _bn(t, True),
    unchecked="no CPU kernel",
)(_batch_norm)
for _op in overloads("aten._native_batch_norm_legit_no_training.default", "aten._batch_norm_no_update.default"):
    rule(_op, pattern=_batch_norm_mapping(_op), samples=_bn)


_NO_STATS = FactorMapping("n c .., c, c -> n c .., c, c", {1: SCALE, 2: BIAS})


@rule(aten._native_batch_norm_legit.no_stats, samples=lambda t: arguments(t(2, 6, 5), t(6), t(6), True, 0.1, 1e-5))
def _no_stats(call: OpCall) -> None:
    _over_all_but_channels(call)
    _NO_STATS(call)


# -- layer norm ----------------------------------------------------------------------------------------------------------


def _layer_norm_shape(x: torch.Tensor, shape: Any, *_: Any, **__: Any) -> Any:
    lead = [*x.shape[: x.dim() - len(shape)], *([1] * len(shape))]
    return torch.empty_like(x), x.new_empty(lead), x.new_empty(lead)


def _normalized_shape(edit: Edit) -> None:
    shape = list(edit["normalized_shape"])
    expected = [edit.size(dim) for dim in edit.result_dims()[-len(shape) :]]
    if shape != expected:
        edit.set("normalized_shape", tuple(expected))


def _layer_norm_module(edit: Edit) -> None:
    rank = len(edit.module.normalized_shape)
    edit.module.normalized_shape = tuple(edit.size(dim) for dim in edit.result_dims()[-rank:])


def _layer_norm(call: OpCall) -> None:
    shape = call["normalized_shape"]
    dims = list(call.dims(call["input"]))
    first = len(dims) - len(shape)
    for name, role in (("weight", "scale"), ("bias", "bias")):
        tensor = call.get(name)
        if tensor is not None:
            dims[first:] = [call.unify(a, b) for a, b in zip(dims[first:], call.dims(tensor), strict=True)]
            call.reads(tensor, role)
    for dim in dims[first:]:
        call.inexact(dim, f"{call.name} normalises over it")
    result, *statistics = call.outs
    call.assign(result, tuple(dims))
    for tensor in statistics:
        if tensor.dim() == len(dims):
            call.assign(tensor, tuple(dims[:first]) + ((),) * len(shape))


rule(
    aten.native_layer_norm.default,
    calls=[
        edits(_normalized_shape, F.layer_norm, torch.layer_norm, takes="input normalized_shape weight bias eps"),
        modules(_layer_norm_module, nn.LayerNorm, nn.RMSNorm),
    ],
    samples=lambda t: arguments(t(2, 3, 6), [6], t(6), t(6), 1e-5),
    shape=_layer_norm_shape,
)(_layer_norm)
_FUSED = [op for op in overloads("aten._fused_rms_norm.default") if op._schema.arguments[1].name == "normalized_shape"]
"""torch 2.8 has another op by this name, which takes the number of dimensions."""

rule(
    aten.rms_norm.default,
    *_FUSED,
    calls=[edits(_normalized_shape, F.rms_norm, torch.rms_norm, takes="input normalized_shape weight eps")],
    samples=lambda t: arguments(t(2, 3, 6), [6], t(6), 1e-5),
)(_layer_norm)

# -- group norm ----------------------------------------------------------------------------------------------------------


def _num_groups(edit: Edit) -> None:
    edit.renew("num_groups", living_groups(edit, edit.source[1], edit.old("num_groups")))


def _group_norm_module(edit: Edit) -> None:
    edit.module.num_groups = living_groups(edit, edit.source[1], edit.module.num_groups)
    edit.module.num_channels = edit.size(edit.source[1])


rule(
    aten.native_group_norm.default,
    pattern="n (g c) .., (g c), (g c) -> n (g c) .., *, *",
    roles={1: SCALE, 2: BIAS},
    sizes={"g": "group"},
    inexact={"c": "group_norm normalises over the channels inside each of its groups", "..": "group_norm normalises over it"},
    calls=[
        edits(_num_groups, F.group_norm, torch.group_norm, takes="input num_groups weight bias eps", sizes="num_groups"),
        modules(_group_norm_module, nn.GroupNorm),
    ],
    samples=lambda t: arguments(t(2, 6, 5), t(6), t(6), 2, 6, 5, 3, 1e-5),
)

# -- weight norm ---------------------------------------------------------------------------------------------------------


@rule(aten._weight_norm_interface.default, samples=lambda t: arguments(t(6, 5), t(6, 1), 0))
def _weight_norm(call: OpCall) -> None:
    v, g = call["v"], call["g"]
    kept = call["dim"] % v.dim()
    dims = list(call.dims(v))
    if g.shape[kept] == v.shape[kept]:
        dims[kept] = call.unify(dims[kept], call.dims(g)[kept])
    call.reads(g, "scale")
    for k, dim in enumerate(dims):
        if k != kept:
            call.inexact(dim, "weight_norm normalises the weight over it")
    call.assign(call.out[0], tuple(dims))
    call.assign(call.out[1], tuple(dim if k == kept else () for k, dim in enumerate(dims)))
