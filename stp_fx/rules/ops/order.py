"""Sorting and searching: the results hold positions along a dimension, so it must keep its numbering."""

from __future__ import annotations

import math

import torch

from stp_fx.rules.call import OpCall, dim_list
from stp_fx.rules.domain import dim_size, fixed_dim
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits
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
rule(aten.kthvalue.default, samples=lambda t: arguments(t(2, 6, 5), 3, 1))(_positions)


@rule(aten.topk.default, samples=lambda t: arguments(t(2, 6, 5), 3, 1))
def _topk(call: OpCall) -> None:
    """Positions that read ``-inf`` are never chosen, so the axis may be cut if its numbers can be followed."""
    source, dims = call["self"], call.dims(call["self"])
    at = call["dim"] % max(len(dims), 1)
    lowest = -math.inf if call["largest"] else math.inf
    if dims and call.excludes(source, at, lowest, int(call["k"]), "topk chooses among its positions"):
        call.state_numbers(call.out[1], dims[at], "position")
    elif dims:
        call.pin(dims[at], "topk.default gives positions along it")
    for tensor in call.outs:
        call.assign(tensor, tuple(fixed_dim(int(tensor.shape[k])) if k == at else dim for k, dim in enumerate(dims)))


def _bins(edit: Edit) -> None:
    """One bin for each number that is left."""
    if edit.changed(edit.result_dims()[0]):
        bins = edit.size(edit.result_dims()[0])
        edit.write("bins", bins)
        edit.write("max", bins - 1)


@rule(
    aten.histc.default,
    calls=[edits(_bins, torch.histc, "histc", takes="input bins min max")],
    samples=lambda t: arguments(t(6), 4, 0, 3),
)
def _histc(call: OpCall) -> None:
    """How often each position was chosen, if there is a bin for each of their numbers."""
    numbers, bins = call["self"], int(call["bins"])
    for dim in call.dims(numbers):
        call.pin(dim, "histc counts its values")
    along = call.numbers_in(numbers, "position")
    if along is None:
        return
    if call.editable and dim_size(along) == bins and call["min"] == 0 and call["max"] == bins - 1:
        call.assign(call.out, (along,))
        call.state_numbers(call.out, along, "count")
    else:
        call.pin(along, "histc counts its numbers in other bins")
