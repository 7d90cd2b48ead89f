"""Handlers for calls that name positions: pieces, splits, selections, padding, rolling."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stp_fx.rules.domain import dim_size
from stp_fx.rules.literals import Edit, TensorDims, literal

__all__: list[str] = []


def _rank(keep: np.ndarray) -> np.ndarray:
    """New position of each old one (of the next kept one, for a removed position)."""
    return np.concatenate([[0], np.cumsum(keep)])


def _part_sizes(edit: Edit, at: int) -> list[int]:
    return [edit.size(part.dims[at]) for part in edit.result]


@literal("split", torch.split, "split_with_sizes", torch.split_with_sizes)
def _split(edit: Edit) -> None:
    at = edit.arg(2, "dim", 0) % len(edit.source)
    given = edit.arg(1, "split_size_or_sections", edit.kwargs.get("split_size", edit.kwargs.get("split_sizes")))
    expected = _part_sizes(edit, at)
    total = edit.size(edit.source[at])
    written = [min(given, total - k) for k in range(0, total, given)] if isinstance(given, int) else list(given)
    if written != expected:
        for name in ("split_size", "split_sizes"):
            if name in edit.node.kwargs:
                edit.node.update_kwarg(name, expected)
                return
        edit.set_arg(1, "split_size_or_sections", expected)


@literal("chunk", torch.chunk, "tensor_split", torch.tensor_split)
def _chunk(edit: Edit) -> None:
    """Chunks of a shortened axis are split by their sizes."""
    at = edit.arg(2, "dim", 0) % len(edit.source)
    if not edit.changed(edit.source[at]):
        return
    edit.node.args = (edit.node.args[0], _part_sizes(edit, at), at)
    edit.node.kwargs = {}
    edit.node.target = "split" if edit.node.op == "call_method" else torch.split


@literal("narrow", torch.narrow)
def _narrow(edit: Edit) -> None:
    at = edit.arg(1, "dim") % len(edit.source)
    start = edit.old(2, "start") % dim_size(edit.source[at])
    edit.renew(2, "start", int(_rank(edit.keep(edit.source[at]))[start]))
    edit.renew(3, "length", edit.size(edit.result_dims()[at]))


@literal("select", torch.select)
def _select(edit: Edit) -> None:
    at = edit.arg(1, "dim") % len(edit.source)
    if edit.changed(edit.source[at]):
        index = edit.old(2, "index") % dim_size(edit.source[at])
        edit.renew(2, "index", int(_rank(edit.keep(edit.source[at]))[index]))


@literal(operator.getitem, operator.setitem)
def _index(edit: Edit) -> None:
    """``x[:, 2:8]``, ``x[..., [0, 2]]``, ``x[:, :8] = y``."""
    if not isinstance(edit.operands[0], TensorDims):
        return
    raw, now, old = edit.node.args[1], edit.args[1], edit.old_args[1]
    single = not isinstance(now, tuple)
    written = [raw] if single else list(raw) if isinstance(raw, tuple) else list(now)
    current, values = ([now], [old]) if single else (list(now), list(old))
    consumed = sum(_width(item) for item in values if item is not Ellipsis)
    at = 0
    for k, item in enumerate(values):
        if item is Ellipsis:
            at += len(edit.source) - consumed
        elif item is not None:
            if _width(item) == 1 and at < len(edit.source) and edit.changed(edit.source[at]):
                wanted = _renewed(item, edit.keep(edit.source[at]))
                if not _selects_same(wanted, current[k], edit.size(edit.source[at])):
                    written[k] = wanted
            at += _width(item)
    if any(a is not b for a, b in zip(written, [raw] if single else list(raw), strict=True)):  # type: ignore[arg-type]
        edit.node.update_arg(1, written[0] if single else tuple(written))


def _selects_same(wanted: Any, current: Any, size: int) -> bool:
    """Whether two indices take the same positions of an axis of ``size``."""
    if isinstance(wanted, slice) and isinstance(current, slice):
        return wanted.indices(size) == current.indices(size)
    if isinstance(wanted, torch.Tensor) or isinstance(current, torch.Tensor):
        return wanted is current
    return bool(wanted == current)


def _width(item: Any) -> int:
    if item is None or isinstance(item, bool):
        return 0
    if isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def _renewed(item: Any, keep: np.ndarray) -> Any:
    rank = _rank(keep)
    if isinstance(item, slice):
        if item == slice(None):
            return item
        start, stop, step = item.indices(len(keep))
        if step != 1:
            return item
        return slice(int(rank[start]), int(rank[max(stop, start)]), None)
    if isinstance(item, int):
        return int(rank[item % len(keep)])
    if isinstance(item, (list, tuple)) and all(isinstance(v, int) for v in item):
        return [int(rank[v % len(keep)]) for v in item if keep[v % len(keep)]]
    return item


@literal(F.pad)
def _pad(edit: Edit) -> None:
    amounts = list(edit.old(1, "pad"))
    new = list(edit.arg(1, "pad"))
    for pair in range(len(amounts) // 2):
        at = len(edit.source) - 1 - pair
        left, right = amounts[2 * pair], amounts[2 * pair + 1]
        source, result = edit.keep(edit.source[at]), edit.keep(edit.result_dims()[at])
        if source.all() and result.all():
            continue
        new[2 * pair] = int(result[:left].sum()) if left >= 0 else -int(source[:-left].sum())
        new[2 * pair + 1] = int(result[len(result) - right :].sum()) if right >= 0 else -int(source[right:].sum())
    if new != list(edit.arg(1, "pad")):
        edit.set_arg(1, "pad", new)


@literal("roll", torch.roll)
def _roll(edit: Edit) -> None:
    shifts, along = edit.old(1, "shifts"), edit.arg(2, "dims")
    if along is None:
        return
    now = edit.arg(1, "shifts")
    single = isinstance(shifts, int)
    pairs = [(shifts, along)] if single else list(zip(shifts, along, strict=True))
    new = []
    for (shift, k), current in zip(pairs, [now] if single else now, strict=True):
        keep = edit.keep(edit.result_dims()[k % len(edit.source)])
        new.append(current if keep.all() else int(keep[: shift % len(keep)].sum()))
    if ([now] if single else list(now)) != new:
        edit.set_arg(1, "shifts", new[0] if single else tuple(new))


@literal(torch.index_select, "index_select")
def _index_select(edit: Edit) -> None:
    """The index is a buffer, and buffers are renumbered with their axes."""
