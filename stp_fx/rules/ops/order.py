"""Sorting and searching: the results hold positions along a dimension, so it must keep its numbering."""

from __future__ import annotations

import torch

from stp_fx.rules.call import OpCall, dim_list
from stp_fx.rules.domain import fixed_dim
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


def _positions(call: OpCall) -> None:
    dims = call.dims(call["self"])
    along = dim_list(call.get("dim"), len(dims))
    for k in along:
        call.pin(dims[k], f"{call.func.__name__} gives positions along it")
    for tensor in call.outs:
        if tensor.dim() == len(dims):
            call.assign(tensor, tuple(fixed_dim(int(tensor.shape[k])) if k in along else dim for k, dim in enumerate(dims)))
        else:
            call.assign(tensor, tuple(dim for k, dim in enumerate(dims) if k not in along))


rule(
    *(aten.argmax.default, aten.argmin.default, aten.sort.default, aten.argsort.default, aten.mode.default),
    *(aten.cummax.default, aten.cummin.default),
    samples=lambda t: arguments(t(2, 6, 5), 1),
)(_positions)
rule(aten.sort.stable, samples=lambda t: arguments(t(2, 6, 5), stable=True, dim=1))(_positions)
rule(aten.topk.default, aten.kthvalue.default, samples=lambda t: arguments(t(2, 6, 5), 3, 1))(_positions)
