"""Joins: concatenation, stacking, padding, gating of one half by the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import FIXED, Dim, fixed_dim, has_ids
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, keeps
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


def _cat_shape(tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    """The plain case of many tensors, which torch looks at one by one in Python; all else is torch's."""
    first = tensors[0]
    rest = [size for k, size in enumerate(first.shape) if k != dim % max(first.dim(), 1)]
    total = 0
    for tensor in tensors:
        sizes = list(tensor.shape)
        if tensor.dim() != first.dim() or not sizes or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return NotImplemented
        total += sizes.pop(dim)
        if sizes != rest:
            return NotImplemented
    rest.insert(dim % first.dim(), total)
    return first.new_empty(rest)


@rule(
    aten.cat.default,
    calls=[keeps(torch.cat, torch.concat, torch.hstack, torch.vstack, torch.dstack)],
    samples=lambda t: arguments([t(2, 3), t(2, 5)], 1),
    shape=_cat_shape,
    keeps_zero=True,
)
def _cat(call: OpCall) -> None:
    out = call.out
    tensors = [t for t in call["tensors"] if t.dim() == out.dim()]
    at = call["dim"] % out.dim()
    columns = [call.dims(t) for t in tensors]
    result: list[Dim] = []
    for k in range(out.dim()):
        if k == at:
            result.append(_joined(call, [dims[k] for dims in columns], [int(t.shape[k]) for t in tensors]))
            continue
        dim = columns[0][k]
        for dims in columns[1:]:
            dim = call.unify(dim, dims[k])
        result.append(dim)
    call.assign(out, tuple(result))


def _joined(call: OpCall, dims: list[Dim], sizes: list[int]) -> Dim:
    if len(dims) == 1:
        return dims[0]
    if not any(has_ids(dim) for dim in dims):
        return fixed_dim(sum(sizes))
    flat = [call.flat(dim) if dim else np.full(size, FIXED) for dim, size in zip(dims, sizes, strict=True)]
    return call.positions(np.concatenate(flat))


@rule(
    aten.stack.default,
    calls=[keeps(torch.stack)],
    samples=lambda t: arguments([t(2, 3), t(2, 3)], 1),
    keeps_zero=True,
)
def _stack(call: OpCall) -> None:
    tensors = call["tensors"]
    at = call["dim"] % call.out.dim()
    dims = list(call.dims(tensors[0]))
    for tensor in tensors[1:]:
        dims = [call.unify(a, b) for a, b in zip(dims, call.dims(tensor), strict=True)]
    dims.insert(at, fixed_dim(len(tensors)))
    call.assign(call.out, tuple(dims))


@rule(aten.glu.default, samples=lambda t: arguments(t(2, 8), 1), keeps_zero=True)
def _glu(call: OpCall) -> None:
    """First half gated by the second: both halves of the dimension go together."""
    dims = call.dims(call["self"])
    at = call["dim"] % len(dims)
    half = int(call.out.shape[at])
    flat = call.flat(dims[at]) if has_ids(dims[at]) else None
    joined = fixed_dim(half) if flat is None else call.unify(call.positions(flat[:half]), call.positions(flat[half:]))
    call.assign(call.out, (*dims[:at], joined, *dims[at + 1 :]))


def _amounts(edit: Edit) -> None:
    """Amounts along shortened axes are renewed; the others stay as they were."""
    old, now, raw = list(edit.old("pad")), list(edit["pad"]), edit.raw("pad")
    written = list(raw) if isinstance(raw, (list, tuple)) else list(now)
    for pair in range(len(old) // 2):
        at, places = len(edit.source) - 1 - pair, (2 * pair, 2 * pair + 1)
        left, right = (old[k] for k in places)
        source, result = edit.keep(edit.source[at]), edit.keep(edit.result_dims()[at])
        if source.all() and result.all():
            for k in places:
                written[k] = edit.before(written[k])
            continue
        wanted = (
            int(result[:left].sum()) if left >= 0 else -int(source[:-left].sum()),
            int(result[len(result) - right :].sum()) if right >= 0 else -int(source[right:].sum()),
        )
        for k, amount in zip(places, wanted, strict=True):
            if now[k] != amount:
                written[k] = amount
    if any(a is not b for a, b in zip(written, raw if isinstance(raw, (list, tuple)) else now, strict=True)):
        edit.set("pad", written)


@rule(
    aten.constant_pad_nd.default,
    calls=[edits(_amounts, F.pad, takes="input pad mode value", sizes="pad")],
    samples=lambda t: arguments(t(2, 5), [2, 1], 0.0),
)
def _pad(call: OpCall) -> None:
    """Padding channels are elements of their own; a negative amount cuts."""
    dims, out = list(call.dims(call["self"])), call.out
    amounts = [int(a) for a in call["pad"]]
    for pair in range(len(amounts) // 2):
        at, left, right = len(dims) - 1 - pair, amounts[2 * pair], amounts[2 * pair + 1]
        if left == 0 and right == 0:
            continue
        if not has_ids(dims[at]):
            dims[at] = fixed_dim(int(out.shape[at]))
            continue
        if not call.editable:
            call.pin(dims[at], "padded where the graph cannot be rewritten")
            dims[at] = fixed_dim(int(out.shape[at]))
            continue
        flat = call.flat(dims[at])
        flat = flat[max(-left, 0) : len(flat) - max(-right, 0)]
        dims[at] = call.positions(np.concatenate([_fresh(call, left), flat, _fresh(call, right)]))
    call.assign(out, tuple(dims))


def _fresh(call: OpCall, amount: int) -> np.ndarray:
    if amount <= 0:
        return np.empty(0, dtype=np.int64)
    axis = call.literal_axis(amount, f"{amount} padding channels")
    return call.flat(axis) if axis else np.full(1, FIXED)
