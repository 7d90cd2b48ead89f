"""Indices written in brackets, ``x[:, 2:8]``, and where positions of a shortened axis are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stp_fx.rules.domain import TensorDims
from stp_fx.rules.edit import Edit

__all__ = ["new_position", "new_positions", "renewed_index"]


def new_positions(keep: np.ndarray) -> np.ndarray:
    """New position of each old one (of the next kept one, for a removed position)."""
    return np.concatenate([[0], np.cumsum(keep)])


def new_position(index: int, keep: np.ndarray) -> int:
    """Of one position; of another that there is where it was removed, since then nobody reads its number."""
    return min(int(new_positions(keep)[index]), int(keep.sum()) - 1)


def renewed_index(edit: Edit) -> None:
    """``x[:, 2:8]``, ``x[..., [0, 2]]``, ``x[:, :8] = y``: along a shortened axis renewed, along others as before."""
    if not isinstance(edit.operand("input"), TensorDims):
        return
    raw, now, old = edit.raw("index"), edit["index"], edit.old("index")
    single = not isinstance(now, tuple)
    given = [raw] if single else list(raw) if isinstance(raw, tuple) else list(now)
    current, values, written = ([now], [old], list(given)) if single else (list(now), list(old), list(given))
    consumed = sum(_width(item) for item in values if item is not Ellipsis)
    at = 0
    for k, item in enumerate(values):
        if item is Ellipsis:
            at += len(edit.source) - consumed
        elif item is not None:
            if _width(item) == 1 and at < len(edit.source):
                if edit.changed(edit.source[at]):
                    wanted = _renewed(item, edit.keep(edit.source[at]))
                    if not _selects_same(wanted, current[k], edit.size(edit.source[at])):
                        written[k] = wanted
                else:
                    written[k] = edit.before(given[k])
            at += _width(item)
    if any(a is not b for a, b in zip(written, given, strict=True)):
        edit.set("index", written[0] if single else tuple(written))


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
    rank = new_positions(keep)
    if isinstance(item, slice):
        if item == slice(None):
            return item
        start, stop, step = item.indices(len(keep))
        if step != 1:
            return item
        return slice(int(rank[start]), int(rank[max(stop, start)]), None)
    if isinstance(item, int):
        return new_position(item % len(keep), keep)
    if isinstance(item, (list, tuple)) and all(isinstance(v, int) for v in item):
        return [int(rank[v % len(keep)]) for v in item if keep[v % len(keep)]]
    return item
