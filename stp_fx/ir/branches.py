"""The origin of a number that Python asks for: where a tensor is, which positions data select, other sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from stp_fx.ir.data_sizes import data_size

__all__ = ["of_device", "of_selection", "selected", "sizes_of"]

_SELECTING = frozenset({"nonzero", "argwhere", "masked_select"})


def of_device(node: fx.Node) -> bool:
    """Whether an answer was computed from where a tensor is."""
    value = node.meta["val"]
    return isinstance(value, torch.device) or (isinstance(value, (bool, str)) and any(map(of_device, node.all_input_nodes)))


def sizes_of(node: fx.Node) -> list[fx.Node]:
    """The sizes that a number was computed from."""
    numbers = [n for n in node.all_input_nodes if isinstance(n.meta["val"], (bool, int, float))]
    return [size for n in numbers for size in sizes_of(n)] if numbers else [node]


def selected(node: fx.Node) -> set[int]:
    """Made-up sizes of what a node selects by data: how many positions of a mask are set."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    indexed = node.target is operator.getitem
    if not indexed and name not in _SELECTING and not (name == "where" and len(node.args) == 1):
        return set()
    tensors = [value for n in node.all_input_nodes if isinstance(value := n.meta["val"], torch.Tensor)]
    masks = [t for t in tensors[1:] if t.dtype in (torch.bool, torch.uint8)] if indexed else tensors
    return {data_size(t.numel()) for t in masks}


def of_selection(node: fx.Node) -> bool:
    """Whether a number was computed from how many positions data select."""
    for size in sizes_of(node):
        value = size.meta["val"]
        if isinstance(value, int) and any(value and value % each == 0 for n in _before(size) for each in selected(n)):
            return True
    return False


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """All that a node was computed from."""
    waiting, seen = [node], {node}
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new
        yield from new
