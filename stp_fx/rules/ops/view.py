"""Views and copies of views: the same positions in another order, cut at other places, or repeated."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import Dim, dim_size, fixed_dim, has_ids
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, follows, keeps
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__ = ["renew_sizes"]

aten = torch.ops.aten

# -- sizes that are written in a call ------------------------------------------------------------------------------------


def renew_sizes(edit: Edit, name: str, dims: tuple[Dim, ...], *, infer: bool) -> None:
    """Writes the sizes that are left, where the call would give others. ``infer``: the call knows ``-1``."""
    spelled = edit.spelled(name)
    if spelled is None:
        return
    raw, values, write = spelled
    expected = [edit.size(dim) for dim in dims]
    wrong = [k for k, (value, size) in enumerate(zip(values, expected, strict=True)) if value not in (size, -1)]
    if not wrong:
        return
    graph, open_size = edit.node.graph, -1 in values
    with graph.inserting_before(edit.node):
        written = _items(graph, raw, len(values)) if isinstance(raw, fx.Node) else list(raw)
        for k in wrong:
            mixed = has_ids(dims[k]) and any(f.ids is None for f in dims[k]) and isinstance(written[k], fx.Node)
            if infer and mixed and not open_size:
                written[k], open_size = -1, True
            elif mixed:  # the batch times heads, say: what is computed, times the share that is left
                share = math.gcd(expected[k], values[k])
                times = graph.call_function(operator.mul, (written[k], expected[k] // share))
                written[k] = graph.call_function(operator.floordiv, (times, values[k] // share))
            else:
                written[k] = expected[k]
    write(written)


def _items(graph: fx.Graph, sizes: fx.Node, count: int) -> list[Any]:
    return [graph.call_function(operator.getitem, (sizes, k)) for k in range(count)]


def _reshaped(edit: Edit) -> None:
    renew_sizes(edit, "shape", edit.result_dims(), infer=True)


def _expanded(edit: Edit) -> None:
    renew_sizes(edit, "size", edit.result_dims(), infer=False)


def _unflattened(edit: Edit) -> None:
    at = edit["dim"] % len(edit.source)
    sizes = edit["sizes"]
    dims = edit.result_dims()[at : at + len(sizes)]
    expected = [edit.size(dim) for dim in dims]
    if any(value not in (size, -1) for value, size in zip(sizes, expected, strict=True)):
        edit.set("sizes", tuple(expected))


# -- reshapes ------------------------------------------------------------------------------------------------------------


def _view(call: OpCall) -> None:
    call.assign(call.out, call.regroup(call.dims(call.args[0]), tuple(int(s) for s in call.out.shape)))


rule(
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    calls=[
        edits(_reshaped, "view", "reshape", torch.reshape, takes="input *shape/size", sizes="shape"),
        edits(_unflattened, "unflatten", torch.unflatten, takes="input dim sizes", sizes="sizes"),
        follows("view_as", "reshape_as"),
        keeps(torch.flatten, "flatten", "ravel"),
    ],
    samples=lambda t: arguments(t(2, 12, 5), [2, 3, 4, 5]),
    keeps_zero=True,
)(_view)
rule(aten._reshape_alias.default, samples=lambda t: arguments(t(2, 12, 5), [2, 60], [60, 1]), keeps_zero=True)(_view)

# -- orders of dimensions ------------------------------------------------------------------------------------------------


@rule(
    aten.permute.default,
    calls=[keeps(torch.permute, "permute", torch.movedim, torch.moveaxis, "movedim")],
    samples=lambda t: arguments(t(2, 3, 5), [0, 2, 1]),
    keeps_zero=True,
)
def _permute(call: OpCall) -> None:
    dims = call.dims(call.args[0])
    call.assign(call.out, tuple(dims[k % len(dims)] for k in call.args[1]))


@rule(
    aten.transpose.int,
    aten.transpose_.default,
    calls=[keeps(torch.transpose, "transpose", torch.swapaxes, "swapaxes", "t")],
    samples=lambda t: arguments(t(2, 3, 5), 1, 2),
    keeps_zero=True,
)
def _transpose(call: OpCall) -> None:
    dims = list(call.dims(call.args[0]))
    if dims:
        a, b = call.args[1] % len(dims), call.args[2] % len(dims)
        dims[a], dims[b] = dims[b], dims[a]
    call.assign(call.out, tuple(dims))


@rule(aten.t.default, samples=lambda t: arguments(t(2, 3)), keeps_zero=True)
def _t(call: OpCall) -> None:
    """``m n -> n m``; a vector is its own transpose."""
    call.assign(call.out, tuple(reversed(call.dims(call.args[0]))))


# -- dimensions of size one ----------------------------------------------------------------------------------------------


@rule(
    aten.unsqueeze.default,
    aten.unsqueeze_.default,
    calls=[keeps(torch.unsqueeze, "unsqueeze")],
    samples=lambda t: arguments(t(2, 3), 1),
    keeps_zero=True,
)
def _unsqueeze(call: OpCall) -> None:
    dims = list(call.dims(call["self"]))
    dims.insert(call["dim"] % call.out.dim(), ())
    call.assign(call.out, tuple(dims[: call.out.dim()]))


def _squeeze(call: OpCall) -> None:
    """A dimension that is kept must not come down to one position: it would be dropped then."""
    dims = call.dims(call["self"])
    wanted = call.get("dim")
    listed = range(len(dims)) if wanted is None else wanted if isinstance(wanted, (list, tuple)) else [wanted]
    dropped = {k % max(len(dims), 1) for k in listed}
    for k in dropped.intersection(range(len(dims))):
        if dim_size(dims[k]) > 1 and has_ids(dims[k]):
            call.several(dims[k], 2)
    call.assign(call.out, tuple(dim for k, dim in enumerate(dims) if k not in dropped or dim_size(dim) != 1))


rule(
    aten.squeeze.default,
    aten.squeeze_.default,
    calls=[keeps(torch.squeeze, "squeeze")],
    samples=lambda t: arguments(t(2, 1, 3)),
    keeps_zero=True,
)(_squeeze)
rule(aten.squeeze.dim, aten.squeeze_.dim, samples=lambda t: arguments(t(2, 1, 3), 1), keeps_zero=True)(_squeeze)
rule(aten.squeeze.dims, samples=lambda t: arguments(t(2, 1, 3, 1), [1, 3]), keeps_zero=True)(_squeeze)

# -- repetition ----------------------------------------------------------------------------------------------------------


@rule(
    aten.expand.default,
    calls=[
        edits(_expanded, "expand", "broadcast_to", torch.broadcast_to, takes="input *size", sizes="size"),
        follows("expand_as"),
        keeps(torch.broadcast_tensors, torch.meshgrid),
    ],
    samples=lambda t: arguments(t(2, 1, 3), [2, 4, 3]),
    keeps_zero=True,
)
def _expand(call: OpCall) -> None:
    dims = call.dims(call.args[0])
    lead = call.out.dim() - len(dims)
    result: list[Dim] = []
    for k, size in enumerate(int(s) for s in call.out.shape):
        old = dims[k - lead] if k >= lead else ()
        result.append(old if dim_size(old) == size else call.literal_axis(size, f"expanded to {size}"))
    call.assign(call.out, tuple(result))


@rule(
    aten.repeat.default,
    calls=[keeps(torch.repeat_interleave, torch.tile, "repeat", "repeat_interleave", "tile")],
    samples=lambda t: arguments(t(2, 3), [4, 1, 2]),
    keeps_zero=True,
)
def _repeat(call: OpCall) -> None:
    dims, times = call.dims(call["self"]), [int(r) for r in call["repeats"]]
    lead = len(times) - len(dims)
    result: list[Dim] = []
    for k, count in enumerate(times):
        old = dims[k - lead] if k >= lead else ()
        if count == 1:
            result.append(old)
        elif dim_size(old) == 1:
            result.append(call.literal_axis(count, f"repeated {count} times"))
        elif has_ids(old):
            result.append(call.positions(np.tile(call.flat(old), count)))
        else:
            result.append(fixed_dim(dim_size(old) * count))
    call.assign(call.out, tuple(result))


# -- absolute positions --------------------------------------------------------------------------------------------------


def _fixed_along(call: OpCall, touched: set[int]) -> None:
    """The result depends on absolute positions along the ``touched`` dimensions."""
    dims, out = call.dims(call.args[0]), call.out
    for k in touched:
        if has_ids(dims[k]):
            call.pin(dims[k], f"{call.name} reads absolute positions along it")
    kept = [dim if k not in touched else fixed_dim(int(out.shape[k])) for k, dim in enumerate(dims) if k < out.dim()]
    call.assign(out, tuple(kept) + tuple(fixed_dim(int(s)) for s in out.shape[len(kept) :]))


def _fixed(call: OpCall) -> None:
    _fixed_along(call, set(range(call.args[0].dim())))


rule(aten.diagonal.default, samples=lambda t: arguments(t(3, 3)))(_fixed)
rule(aten.as_strided.default, samples=lambda t: arguments(t(2, 6), [3, 4], [4, 1]))(_fixed)


@rule(aten.unfold.default, samples=lambda t: arguments(t(2, 6), 1, 3, 1))
def _unfold(call: OpCall) -> None:
    _fixed_along(call, {call["dimension"] % call.args[0].dim()})


@rule(aten.tril.default, aten.triu.default, samples=lambda t: arguments(t(2, 3, 5)))
def _triangle(call: OpCall) -> None:
    rank = call.args[0].dim()
    _fixed_along(call, {rank - 2, rank - 1})


@rule(
    aten.as_strided_.default,
    samples={
        "": lambda t: arguments(t(2, 6, 1, 1), [2, 6, 1, 1], [6, 1, 6, 6]),
        "other": lambda t: arguments(t(2, 6), [3, 4], [4, 1]),
    },
)
def _restride(call: OpCall) -> None:
    """Pooling to one position lays its result out anew this way: the same shape is the same positions."""
    dims = call.dims(call.args[0])
    if tuple(dim_size(dim) for dim in dims) == tuple(call.out.shape):
        call.assign(call.out, dims)
        return
    for dim in dims:
        call.pin(dim, "as_strided_ reads absolute positions")
    call.assign(call.out, tuple(fixed_dim(int(size)) for size in call.out.shape))
