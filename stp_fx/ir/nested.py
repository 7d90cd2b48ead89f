"""Values inside lists, tuples, dicts and whatever else is registered with pytree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.utils._pytree as pytree

__all__ = ["holds", "leaves_of", "mapped"]

T = TypeVar("T")


def leaves_of(kind: type[T], value: Any) -> list[T]:
    """The leaves of that type, in order."""
    if isinstance(value, kind):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, kind)]


def holds(kind: type, value: Any) -> bool:
    """Whether a value is of that type, or has a leaf that is."""
    if isinstance(value, kind):
        return True
    return any(isinstance(leaf, kind) for leaf in pytree.tree_leaves(value))


def mapped(kind: type[T], function: Callable[[T], Any], value: Any) -> Any:
    """``value`` with its leaves of that type replaced; containers keep their types."""
    return function(value) if isinstance(value, kind) else pytree.tree_map_only(kind, function, value)
