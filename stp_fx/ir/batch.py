"""Keeping the batch free. A trace runs with a large prime as the batch, so every number that came from it gives itself away."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

__all__ = ["BATCH", "bakes_batch", "free_batch", "with_batch"]

BATCH = 1009
"""Prime, and larger than the channel counts, window sizes and head counts that could be mistaken for a multiple of it."""


def with_batch(values: dict[str, Any], batch: int) -> dict[str, Any] | None:
    """The values with another leading size; ``None`` if the tensors do not share one."""
    tensors = list(values.values())
    if not all(isinstance(t, torch.Tensor) and t.dim() >= 1 for t in tensors):
        return None
    if len({t.shape[0] for t in tensors}) != 1:
        return None
    return {name: torch.empty((batch, *t.shape[1:]), dtype=t.dtype, device="meta") for name, t in values.items()}


def free_batch(graph: fx.Graph) -> None:
    """Replaces every number that is a multiple of the prime by what it was computed from, the input's leading size."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    made: dict[int, fx.Node] = {}

    def regenerated(value: int) -> fx.Node:
        if BATCH not in made:
            with graph.inserting_after(placeholders[-1]):
                made[BATCH] = graph.call_method("size", (placeholders[0], 0))
        if value not in made:
            with graph.inserting_after(made[BATCH]):
                made[value] = graph.call_function(operator.mul, (made[BATCH], value // BATCH))
        return made[value]

    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method"):
            node.args = _replaced(node.args, regenerated)
            node.kwargs = _replaced(node.kwargs, regenerated)


def bakes_batch(constants: Iterable[Any]) -> bool:
    """Whether a constant tensor of the graph was made as long as the batch; then the batch cannot be freed."""
    return any(isinstance(t, torch.Tensor) and any(size and size % BATCH == 0 for size in t.shape) for t in constants)


def _replaced(value: Any, regenerated: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return regenerated(value) if value and value % BATCH == 0 and abs(value) < 2**40 else value
    if isinstance(value, (list, tuple)):
        new = [_replaced(v, regenerated) for v in value]
        return value if all(a is b for a, b in zip(new, value, strict=True)) else type(value)(new)
    if isinstance(value, dict):
        return {k: _replaced(v, regenerated) for k, v in value.items()}
    if isinstance(value, slice):
        parts = [_replaced(v, regenerated) for v in (value.start, value.stop, value.step)]
        return slice(*parts)
    return value
