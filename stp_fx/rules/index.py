"""Indexing: a constant index moves element ids; any other index pins what it looks up."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.rules.domain import Context, Dim, Dims, fixed_dim, has_ids
from stp_fx.rules.registry import rule

__all__: list[str] = []

_BY_DATA = "looked up by an index that is data"


def _look_up(ctx: Context, dim: Dim, index: torch.Tensor) -> Dim | None:
    """The positions that a constant one-dimensional index takes out of ``dim``; ``None`` if it cannot be followed."""
    values = ctx.constant(index)
    if values is None or values.ndim != 1 or not ctx.editable:
        return None
    flat = ctx.flat(dim)
    taken = ctx.positions(flat[values])
    if not taken or taken[0].ids is None:
        return None
    ctx.renumber(index, flat)
    return ctx.unify(ctx.dims(index)[0], taken) if has_ids(ctx.dims(index)[0]) else taken


@rule("aten.index_select.default")
def _index_select(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    source, at, index = args[0], args[1] % max(args[0].dim(), 1), args[2]
    dims = list(ctx.dims(source))
    found = _look_up(ctx, dims[at], index) if has_ids(dims[at]) else None
    if found is None:
        ctx.pin(dims[at], f"index_select: {_BY_DATA}")
        found = ctx.dims(index)[0] if index.dim() and has_ids(ctx.dims(index)[0]) else fixed_dim(int(out.shape[at]))
    dims[at] = found
    ctx.assign(out, tuple(dims))


@rule("aten.index.Tensor", "aten._unsafe_index.Tensor")
def _index(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    dims, indices = ctx.dims(args[0]), list(args[1])
    used = [k for k, index in enumerate(indices) if index is not None]
    if len(used) == 1 and indices[used[0]].dim() == 1 and indices[used[0]].dtype not in (torch.bool, torch.uint8):
        at = used[0]
        found = _look_up(ctx, dims[at], indices[at]) if has_ids(dims[at]) else None
        if found is not None:
            ctx.assign(out, (*dims[:at], found, *dims[at + 1 :]))
            return
    _advanced(ctx, dims, indices, used, out)


def _advanced(ctx: Context, dims: Dims, indices: list[Any], used: list[int], out: torch.Tensor) -> None:
    """Indexed dimensions are pinned; the others keep their order around the indices' own (fixed) dimensions."""
    covered: set[int] = set()
    at = 0
    starts: list[int] = []
    for index in indices:
        width = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            covered.update(range(at, at + width))
            starts.append(at)
            for dim in ctx.dims(index):
                ctx.pin(dim, "used as an index")
        at += width
    for k in covered:
        ctx.pin(dims[k], f"index: {_BY_DATA}")
    together = used == list(range(used[0], used[-1] + 1)) if used else True
    before = [dim for k, dim in enumerate(dims) if k not in covered and together and k < starts[0]] if starts else list(dims)
    after = [dim for k, dim in enumerate(dims) if k not in covered and (not together or k > starts[0])] if starts else []
    middle = [fixed_dim(int(s)) for s in out.shape[len(before) : out.dim() - len(after)]]
    ctx.assign(out, (*before, *middle, *after))


@rule("aten.embedding.default")
def _embedding(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """``v d, .. -> .. d``: the vocabulary keeps its numbering."""
    table, index = ctx.dims(args[0]), ctx.dims(args[1])
    ctx.reads(args[0], "weight", 1, None)
    ctx.pin(table[0], "embedding: rows are looked up by number")
    ctx.assign(out, (*index, *table[1:]))


@rule("aten._embedding_bag.default", "aten._embedding_bag_forward_only.default")
def _embedding_bag(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``v d, .. -> b d``, a sum, mean or maximum over the rows of a bag."""
    table = ctx.dims(args[0])
    ctx.reads(args[0], "weight", 1, None)
    ctx.pin(table[0], "embedding: rows are looked up by number")
    ctx.assign(out[0], (fixed_dim(int(out[0].shape[0])), *table[1:]))


@rule("aten.gather.default")
def _gather(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    source, at, index = args[0], args[1] % max(args[0].dim(), 1), args[2]
    ctx.assign(out, _aligned(ctx, [source, index], at, out, f"gather: {_BY_DATA}"))


@rule(
    "aten.scatter.src",
    "aten.scatter_.src",
    "aten.scatter.value",
    "aten.scatter_.value",
    "aten.scatter_add.default",
    "aten.scatter_add_.default",
    "aten.scatter_reduce.two",
    "aten.scatter_reduce_.two",
)
def _scatter(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    tensors = [args[0], args[2], *(t for t in args[3:4] if isinstance(t, torch.Tensor))]
    ctx.assign(out, _aligned(ctx, tensors, args[1] % max(args[0].dim(), 1), out, f"scatter: {_BY_DATA}"))


def _aligned(ctx: Context, tensors: list[torch.Tensor], at: int, out: torch.Tensor, reason: str) -> Dims:
    """All dimensions but ``at`` run in step where they are equally long; ``at`` is pinned in every tensor."""
    result: list[Dim] = []
    for k in range(out.dim()):
        size, dim = int(out.shape[k]), fixed_dim(int(out.shape[k]))
        if k != at and all(t.shape[k] == size for t in tensors):
            dim = ctx.dims(tensors[0])[k]
            for tensor in tensors[1:]:
                dim = ctx.unify(dim, ctx.dims(tensor)[k])
        else:
            for tensor in tensors:
                ctx.pin(ctx.dims(tensor)[k], reason)
        result.append(dim)
    return tuple(result)


@rule("aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default")
def _index_put(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    for tensor in (args[0], args[2], *(i for i in args[1] if i is not None)):
        for dim in ctx.dims(tensor):
            ctx.pin(dim, f"index_put: {_BY_DATA}")
    ctx.assign(out, ctx.dims(args[0]))


@rule("aten.slice_scatter.default", "aten.select_scatter.default")
def _into(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
    """Functional forms of writing into a piece; in graphs of ours only after functionalisation, so they pin the piece's axis."""
    target, piece, *rest = args
    dims, source = ctx.dims(target), list(ctx.dims(piece))
    at = (rest[0] if rest else 0) % len(dims)
    ctx.pin(dims[at], "written into by position")
    if len(source) == len(dims):
        ctx.pin(source[at], "written into by position")
        del source[at]
    others = [dim for k, dim in enumerate(dims) if k != at]
    joined = [ctx.unify(a, b) for a, b in zip(others, source, strict=True)]
    joined.insert(at, dims[at])
    ctx.assign(out, tuple(joined))
