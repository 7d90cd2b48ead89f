"""Values inside lists, tuples, dicts, whatever else is registered with pytree, and plain objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import nn

from stp_fx.errors import InputError

__all__ = ["holds", "leaves_of", "mapped", "own_containers", "tensors_within"]

T = TypeVar("T")


def leaves_of(kind: type[T], value: Any) -> list[T]:
    """The leaves of that type, in order."""
    if isinstance(value, kind):
        return [value]
    return [leaf for leaf in _leaves(value) if isinstance(leaf, kind)]


def holds(kind: type, value: Any) -> bool:
    """Whether a value is of that type, or has a leaf that is."""
    if isinstance(value, kind):
        return True
    return any(isinstance(leaf, kind) for leaf in _leaves(value))


def mapped(kind: type[T], function: Callable[[T], Any], value: Any) -> Any:
    """``value`` with its leaves of that type replaced; containers keep their types."""
    if isinstance(value, kind):
        return function(value)
    try:
        return pytree.tree_map_only(kind, function, value)
    except RecursionError:
        _leaves(value)
        raise


def own_containers(value: Any) -> Any:
    """The same leaves in lists and dicts of their own, which a forward may change."""
    return value if isinstance(value, torch.Tensor) else mapped(torch.Tensor, lambda tensor: tensor, value)


def _leaves(value: Any) -> list[Any]:
    """The leaves of any type, in order.

    Raises:
        InputError: a container that holds itself, or that is nested deeper than pytree can follow.
    """
    try:
        return pytree.tree_leaves(value)
    except RecursionError:
        raise InputError(
            f"a {type(value).__name__} is nested too deeply to be looked through, or holds itself: give flatter lists and dicts"
        ) from None


def tensors_within(value: Any) -> list[torch.Tensor]:
    """All tensors in a value, also those that objects keep as attributes (a dataclass that pytree does not know)."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            found.append(each)
            continue
        if id(each) in seen or isinstance(each, (str, bytes, int, float, complex, type, nn.Module)):
            continue
        seen.add(id(each))
        leaves = pytree.tree_leaves(each)
        waiting.extend(_attributes(each) if len(leaves) == 1 and leaves[0] is each else leaves)
    return found


def _attributes(value: Any) -> list[Any]:
    """The values that an object keeps: the members of a set, attributes, slots."""
    if isinstance(value, (set, frozenset)):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
