"""Pieces and orders of one axis: they move element ids, so any piece or permutation is exact."""

from __future__ import annotations

import math
import operator

import numpy as np
import torch

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import Dim, Factor, dim_size, fixed_dim, has_ids
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, keeps
from stp_fx.rules.ops._positions import new_position, new_positions, renewed_index
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


def _piece(call: OpCall, dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    """Positions ``start:stop:step`` of a dimension."""
    length = len(range(start, stop, step))
    if length == dim_size(dim):
        return dim
    if not has_ids(dim):
        return fixed_dim(length)
    if not call.editable or step != 1:
        call.pin(dim, "a piece of it is taken " + ("in steps" if step != 1 else "where the graph cannot be rewritten"))
        return fixed_dim(length)
    outer, *rest = dim
    inner = math.prod(factor.size for factor in rest)
    if inner > 1 and start % inner == 0 and length % inner == 0 and length > inner:
        ids = None if outer.ids is None else outer.ids[start // inner : stop // inner]
        return (Factor(length // inner, ids), *rest)
    return call.positions(call.flat(dim)[start:stop])


# -- slices --------------------------------------------------------------------------------------------------------------


def _narrow(edit: Edit) -> None:
    at = edit["dim"] % len(edit.source)
    start = edit.old("start") % dim_size(edit.source[at])
    edit.renew("start", int(new_positions(edit.keep(edit.source[at]))[start]))
    edit.renew("length", edit.size(edit.result_dims()[at]))


@rule(
    aten.slice.Tensor,
    calls=[
        edits(renewed_index, operator.getitem, operator.setitem, takes="input index value", sizes="index"),
        edits(_narrow, "narrow", torch.narrow, takes="input dim start length", sizes="start length"),
    ],
    samples=lambda t: arguments(t(2, 8), 1, 2, 6),
    keeps_zero=True,
)
def _slice(call: OpCall) -> None:
    source, step = call["self"], int(call["step"])
    dims = list(call.dims(source))
    at = call["dim"] % len(dims)
    start, stop, _ = slice(call["start"], call["end"], step).indices(int(source.shape[at]))
    dims[at] = _piece(call, dims[at], start, max(stop, start), step)
    call.assign(call.out, tuple(dims))


# -- splits --------------------------------------------------------------------------------------------------------------


def _part_sizes(edit: Edit, at: int) -> list[int]:
    return [edit.size(part.dims[at]) for part in edit.result]


def _split_sizes(edit: Edit) -> None:
    at = edit.get("dim", 0) % len(edit.source)
    given = edit["split_size"]
    expected = _part_sizes(edit, at)
    total = edit.size(edit.source[at])
    written = [min(given, total - k) for k in range(0, total, given)] if isinstance(given, int) else list(given)
    if written != expected:
        edit.set("split_size", expected)


def _chunk_sizes(edit: Edit) -> None:
    """Chunks of a shortened axis are split by their sizes."""
    at = edit.get("dim", 0) % len(edit.source)
    if not edit.changed(edit.source[at]):
        return
    edit.node.args, edit.node.kwargs = (edit.raw("input"), _part_sizes(edit, at), at), {}
    edit.node.target = "split" if edit.node.op == "call_method" else torch.split


def _split(call: OpCall) -> None:
    dims = call.dims(call["self"])
    at = call["dim"] % len(dims)
    start = 0
    for tensor in call.outs:
        stop = start + int(tensor.shape[at])
        call.assign(tensor, (*dims[:at], _piece(call, dims[at], start, stop), *dims[at + 1 :]))
        start = stop


rule(
    aten.split.Tensor,
    aten.unsafe_split.Tensor,
    calls=[
        edits(
            _split_sizes,
            *("split", torch.split, "split_with_sizes", torch.split_with_sizes),
            takes="input split_size/split_size_or_sections/split_sizes dim",
            sizes="split_size",
        ),
        edits(_chunk_sizes, "chunk", torch.chunk, takes="input chunks dim"),
        edits(
            _chunk_sizes,
            *("tensor_split", torch.tensor_split),
            takes="input sections/indices_or_sections/indices/tensor_indices_or_sections dim",
        ),
    ],
    samples=lambda t: arguments(t(2, 8), 4, 1),
    keeps_zero=True,
)(_split)
rule(
    aten.split_with_sizes.default,
    aten.unsafe_split_with_sizes.default,
    samples=lambda t: arguments(t(2, 8), [3, 5], 1),
    keeps_zero=True,
)(_split)


# -- single positions ----------------------------------------------------------------------------------------------------


def _select_index(edit: Edit) -> None:
    at = edit["dim"] % len(edit.source)
    if edit.changed(edit.source[at]):
        index = edit.old("index") % dim_size(edit.source[at])
        edit.renew("index", new_position(index, edit.keep(edit.source[at])))
    else:
        edit.freeze("index")


@rule(
    aten.select.int,
    calls=[edits(_select_index, "select", torch.select, takes="input dim index", sizes="index")],
    samples=lambda t: arguments(t(2, 8), 1, 3),
    keeps_zero=True,
)
def _select(call: OpCall) -> None:
    dims, index = call.dims(call["self"]), call["index"]
    at = call["dim"] % len(dims)
    if has_ids(dims[at]) and not (call.editable and call.unread):
        if call.editable:
            flat = call.flat(dims[at])
            call.pin((Factor(1, flat[index : index + 1 or None]),), f"select takes position {index}")
        else:
            call.pin(dims[at], f"select takes position {index}")
    call.assign(call.out, dims[:at] + dims[at + 1 :])


@rule(
    aten.unbind.int,
    calls=[keeps(torch.unbind, "unbind")],
    samples=lambda t: arguments(t(2, 3), 1),
    keeps_zero=True,
)
def _unbind(call: OpCall) -> None:
    dims = call.dims(call["self"])
    at = call["dim"] % len(dims)
    call.pin(dims[at], "unbind makes one tensor of each position")
    for tensor in call.outs:
        call.assign(tensor, dims[:at] + dims[at + 1 :])


# -- orders --------------------------------------------------------------------------------------------------------------


@rule(
    aten.flip.default,
    calls=[keeps(torch.flip, "flip")],
    samples=lambda t: arguments(t(2, 3), [1]),
    keeps_zero=True,
)
def _flip(call: OpCall) -> None:
    dims = list(call.dims(call["self"]))
    for at in {k % len(dims) for k in call["dims"]}:
        if has_ids(dims[at]):
            dims[at] = call.positions(call.flat(dims[at])[::-1])
    call.assign(call.out, tuple(dims))


def _shifts(edit: Edit) -> None:
    """Shifts along one dimension add up; the first of them carries the new sum."""
    shifts, along = edit.old("shifts"), edit.get("dims")
    if along is None or along in ((), []):
        return
    single = isinstance(shifts, int)
    rank = len(edit.source)
    old = {}
    for shift, k in [(shifts, along)] if single else zip(shifts, along, strict=True):
        old[k % rank] = old.get(k % rank, 0) + shift
    raw, now = edit.raw("shifts"), edit["shifts"]
    written = [raw] if single else list(raw) if isinstance(raw, (list, tuple)) else list(now)
    current = [now] if single else list(now)
    renewed: dict[int, int] = {}
    for at, total in old.items():
        keep = edit.keep(edit.result_dims()[at])
        if not keep.all():
            renewed[at] = int(keep[: total % len(keep)].sum())
    at_of = [along % rank] if single else [k % rank for k in along]
    for position, at in enumerate(at_of):
        if at not in renewed:
            written[position] = edit.before(written[position])
        elif sum(c for c, k in zip(current, at_of, strict=True) if k == at) % max(edit.size(edit.source[at]), 1) != renewed[at]:
            first = at_of.index(at) == position
            written[position] = renewed[at] if first else 0
    edit.write("shifts", written[0] if single else tuple(written))


@rule(
    aten.roll.default,
    calls=[edits(_shifts, "roll", torch.roll, takes="input shifts dims", sizes="shifts")],
    samples={"": lambda t: arguments(t(2, 5), [2], [1]), "twice": lambda t: arguments(t(2, 5), [1, 2], [1, 1])},
    shape=lambda x, *_, **__: torch.empty_like(x),
    keeps_zero=True,
)
def _roll(call: OpCall) -> None:
    dims = list(call.dims(call["self"]))
    if not call["dims"]:
        for dim in dims:
            call.pin(dim, "roll without dims moves positions across dimensions")
    for shift, k in zip(call["shifts"], call["dims"], strict=False):
        at = k % len(dims)
        if has_ids(dims[at]):
            if not call.editable:
                call.pin(dims[at], "rolled where the graph cannot be rewritten")
            else:
                dims[at] = call.positions(np.roll(call.flat(dims[at]), shift))
    call.assign(call.out, tuple(dims))
