"""Indexing: a constant index moves element ids; any other index pins what it looks up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import Dim, Dims, dim_size, fixed_dim, has_ids
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, follows, keeps, modules
from stp_fx.rules.mapping import weight
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten

_BY_DATA = "looked up by an index that is data"


def _look_up(call: OpCall, dim: Dim, index: torch.Tensor) -> Dim | None:
    """The positions that a constant one-dimensional index takes out of ``dim``; ``None`` if it cannot be followed."""
    values = call.constant(index)
    if values is None or values.ndim != 1 or not call.editable:
        return None
    flat = call.flat(dim)
    taken = call.positions(flat[values])
    if not taken or taken[0].ids is None:
        return None
    call.renumber(index, flat)
    return call.unify(call.dims(index)[0], taken) if has_ids(call.dims(index)[0]) else taken


def _buffer(edit: Edit) -> None:
    """The index is a buffer, and buffers are renumbered with their axes."""


@rule(
    aten.index_select.default,
    calls=[edits(_buffer, torch.index_select, "index_select", takes="input dim index")],
    samples=lambda t: arguments(t(2, 5), 1, t.index(3, below=5)),
    keeps_zero=True,
)
def _index_select(call: OpCall) -> None:
    source, index = call["self"], call["index"]
    at = call["dim"] % max(source.dim(), 1)
    dims = list(call.dims(source))
    found = _look_up(call, dims[at], index) if has_ids(dims[at]) else None
    if found is None:
        call.pin(dims[at], f"index_select: {_BY_DATA}")
        found = call.dims(index)[0] if index.dim() and has_ids(call.dims(index)[0]) else fixed_dim(int(call.out.shape[at]))
        if call.constant(index) is not None:  # whose entries would go with the positions that they take
            call.pin(found, "index_select: takes positions that stay")
    dims[at] = found
    call.assign(call.out, tuple(dims))


@rule(
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    samples=lambda t: arguments(t(2, 5, 3), [None, t.index(4, below=5)]),
    keeps_zero=True,
)
def _index(call: OpCall) -> None:
    dims, indices = call.dims(call["self"]), list(call["indices"])
    used = [k for k, index in enumerate(indices) if index is not None]
    if len(used) == 1 and indices[used[0]].dim() == 1 and indices[used[0]].dtype not in (torch.bool, torch.uint8):
        at = used[0]
        found = _look_up(call, dims[at], indices[at]) if has_ids(dims[at]) else None
        if found is not None:
            call.assign(call.out, (*dims[:at], found, *dims[at + 1 :]))
            return
    _advanced(call, dims, indices, used)


def _advanced(call: OpCall, dims: Dims, indices: list[Any], used: list[int]) -> None:
    """Indexed dimensions are pinned; the others keep their order around the indices' own (fixed) dimensions."""
    before, after = _around(call, dims, indices, used)
    middle = [fixed_dim(int(s)) for s in call.out.shape[len(before) : call.out.dim() - len(after)]]
    call.assign(call.out, (*(dims[k] for k in before), *middle, *(dims[k] for k in after)))


def _around(call: OpCall, dims: Dims, indices: list[Any], used: list[int]) -> tuple[list[int], list[int]]:
    """Dimensions that an index leaves, before and after those of what it gives; pins the others."""
    covered: set[int] = set()
    at = 0
    starts: list[int] = []
    for index in indices:
        width = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            covered.update(range(at, at + width))
            starts.append(at)
            for dim in call.dims(index):
                call.pin(dim, "used as an index")
        at += width
    for k in covered:
        call.pin(dims[k], f"index: {_BY_DATA}")
    together = used == list(range(used[0], used[-1] + 1)) if used else True
    left = [k for k in range(len(dims)) if k not in covered]
    before = [k for k in left if together and k < starts[0]] if starts else left
    return before, [k for k in left if k not in before]


# -- embeddings ----------------------------------------------------------------------------------------------------------


def _embedding(edit: Edit) -> None:
    edit.module.embedding_dim = edit.size(edit.result_dims()[-1])


_ROWS = {"v": "embedding: rows are looked up by number"}

rule(
    aten.embedding.default,
    pattern="v d, .. -> .. d",
    roles={0: weight(1)},
    pins=_ROWS,
    calls=[keeps(F.embedding), modules(_embedding, nn.Embedding, nn.EmbeddingBag)],
    samples=lambda t: arguments(t(9, 5), t.index(2, 3, below=9)),
)


@rule(
    aten.embedding_renorm_.default,
    samples=lambda t: arguments(t(9, 5), t.index(2, 3, below=9), 1.0, 2.0),
)
def _renorm(call: OpCall) -> None:
    """``max_norm``: rows that are looked up are scaled down where their norm is larger."""
    rows, numbers = call.dims(call["self"])
    call.pin(rows, _ROWS["v"])
    call.inexact(numbers, "embedding_renorm normalises over it")
    call.assign(call.out, (rows, numbers))


rule(
    *overloads("aten._embedding_bag.default", "aten._embedding_bag_forward_only.default"),
    pattern="v d, *, *, * -> _ d, *, *, *",  # a sum, mean or maximum over the rows of a bag
    roles={0: weight(1)},
    pins=_ROWS,
    samples=lambda t: arguments(t(9, 5), t.index(6, below=9), torch.tensor([0, 2], device=t.device)),
)


# -- gather and scatter --------------------------------------------------------------------------------------------------


def _chosen(call: OpCall, at: int) -> Dim | None:
    """The dimension of whose positions the index holds the numbers, if ``self`` has all of them along ``at``."""
    if call.name.rstrip("_") not in ("gather", "scatter", "scatter_add", "scatter_reduce"):
        return None
    along = call.numbers_in(call["index"], "position")
    if along is None or dim_size(along) == call["self"].shape[at]:
        return along
    call.pin(along, f"{call.name}: the numbers of its positions are used along another dimension")
    return None


def _aligned(call: OpCall, tensors: list[torch.Tensor], reason: str) -> None:
    """All dimensions but ``dim`` run in step where they are equally long; ``dim`` is pinned in every tensor."""
    out, at = call.out, call["dim"] % max(call["self"].dim(), 1)
    result: list[Dim] = []
    for k in range(out.dim()):
        size, dim = int(out.shape[k]), fixed_dim(int(out.shape[k]))
        if k != at and all(t.shape[k] == size for t in tensors):
            dim = call.dims(tensors[0])[k]
            for tensor in tensors[1:]:
                dim = call.unify(dim, call.dims(tensor)[k])
        elif k == at and (along := _chosen(call, k)) is not None:
            looked_up = call.unify(along, call.dims(tensors[0])[k])
            for tensor in tensors[1:]:
                call.pin(call.dims(tensor)[k], reason)
            dim = dim if call.name == "gather" else looked_up
        else:
            for tensor in tensors:
                call.pin(call.dims(tensor)[k], reason)
        result.append(dim)
    call.assign(out, tuple(result))


@rule(aten.gather.default, samples=lambda t: arguments(t(2, 5), 1, t.index(2, 3, below=5)), keeps_zero=True)
def _gather(call: OpCall) -> None:
    _aligned(call, [call["self"], call["index"]], f"gather: {_BY_DATA}")


def _scatter(call: OpCall) -> None:
    source = call.get("src")
    tensors = [call["self"], call["index"], *([source] if isinstance(source, torch.Tensor) else [])]
    _aligned(call, tensors, f"scatter: {_BY_DATA}")


rule(
    *(aten.scatter.src, aten.scatter_.src, aten.scatter_add.default, aten.scatter_add_.default),
    samples=lambda t: arguments(t(2, 5), 1, t.index(2, 3, below=5), t(2, 3)),
)(_scatter)
rule(
    aten.scatter.value,
    aten.scatter_.value,
    samples=lambda t: arguments(t(2, 5), 1, t.index(2, 3, below=5), 0.0),
)(_scatter)
rule(
    aten.scatter_reduce.two,
    aten.scatter_reduce_.two,
    samples=lambda t: arguments(t(2, 5), 1, t.index(2, 3, below=5), t(2, 3), "sum"),
)(_scatter)


def _by_number(call: OpCall) -> None:
    """Slices of the source go where the index says."""
    for dim in call.dims(call["index"]):
        call.pin(dim, "used as an index")
    _aligned(call, [call["self"], call["source"]], f"{call.name.strip('_')}: {_BY_DATA}")


rule(
    *(aten.index_add.default, aten.index_add_.default, aten.index_copy.default, aten.index_copy_.default),
    calls=[follows(torch.index_add, torch.index_copy, "index_add", "index_add_", "index_copy", "index_copy_")],
    samples=lambda t: arguments(t(2, 5), 1, t.index(3, below=5), t(2, 3)),
)(_by_number)
rule(
    aten.index_reduce.default,
    aten.index_reduce_.default,
    calls=[follows(torch.index_reduce, "index_reduce", "index_reduce_")],
    samples=lambda t: arguments(t(2, 5), 1, t.index(3, below=5), t(2, 3), "amax"),
)(_by_number)


# -- writing by position -------------------------------------------------------------------------------------------------


@rule(
    *(aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
    samples={
        "": lambda t: arguments(t(2, 5), [None, t.index(3, below=5)], t(2, 3)),
        "rows": lambda t: arguments(t(5, 2), [t.index(3, below=5)], t(3, 2)),
    },
    keeps_zero=True,
)
def _index_put(call: OpCall) -> None:
    """Where the index leaves a dimension whole, values run along it; what the index takes, and gives, is pinned."""
    dims, indices = list(call.dims(call["self"])), list(call["indices"])
    used = [k for k, index in enumerate(indices) if index is not None]
    before, after = _around(call, tuple(dims), indices, used)
    width = max((1 if indices[k].dtype in (torch.bool, torch.uint8) else indices[k].dim() for k in used), default=0)
    places = [*before, *[None] * width, *after]
    for place, dim in zip(reversed(places), reversed(call.dims(call["values"])), strict=False):
        if place is None:
            call.pin(dim, f"index_put: {_BY_DATA}")
        elif dim_size(dim) > 1:
            dims[place] = call.unify(dims[place], dim)
    call.assign(call.out, tuple(dims))


def _into(call: OpCall) -> None:
    """Functional forms of writing into a piece; in graphs of ours only after functionalisation, so they pin the piece's axis."""
    dims, source = call.dims(call["self"]), list(call.dims(call["src"]))
    at = call["dim"] % len(dims)
    call.pin(dims[at], "written into by position")
    if len(source) == len(dims):
        call.pin(source[at], "written into by position")
        del source[at]
    others = [dim for k, dim in enumerate(dims) if k != at]
    joined = [call.unify(a, b) for a, b in zip(others, source, strict=True)]
    joined.insert(at, dims[at])
    call.assign(call.out, tuple(joined))


rule(aten.slice_scatter.default, samples=lambda t: arguments(t(2, 5), t(2, 3), 1, 0, 3))(_into)
rule(aten.select_scatter.default, samples=lambda t: arguments(t(2, 5), t(2), 1, 0))(_into)
