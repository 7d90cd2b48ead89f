"""Reading an op's arguments by the names of its schema."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["bound", "dim_list", "tensors_in"]


def bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults included."""
    names = func._schema.arguments
    values = {a.name: a.default_value for a in names if a.has_default_value()}
    values.update({a.name: value for a, value in zip(names, args, strict=False)})
    values.update(kwargs)
    return values


def dim_list(dim: Any, rank: int) -> list[int]:
    """Non-negative dimensions; all of them for ``None`` or an empty list."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    if rank == 0:
        return []
    return sorted({d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])})


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    return []
