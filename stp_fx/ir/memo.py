"""Results about a graph, remembered beside it: a memo of pure functions, which no later call depends on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import fx

__all__ = ["Same", "forget", "remembered"]

T = TypeVar("T")

_LOCK = threading.Lock()
_KNOWN: weakref.WeakKeyDictionary[fx.GraphModule, dict[str, tuple[Hashable, Any]]] = weakref.WeakKeyDictionary()


class Same:
    """A key that equals only itself around the same object: for values that compare by identity."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def remembered(gm: fx.GraphModule, kind: str, key: Hashable, compute: Callable[[], T]) -> T:
    """``compute()``, or what it gave for this graph at the last call with an equal ``key``.

    One value a graph and ``kind`` is kept, as long as the graph lives. It must follow from ``key`` and the graph alone and must
    not refer to the graph. Two threads may compute the same value at once; both get equal ones.
    """
    with _LOCK:
        known = _KNOWN.setdefault(gm, {}).get(kind)
    if known is not None and known[0] == key:
        return known[1]
    value = compute()
    with _LOCK:
        _KNOWN.setdefault(gm, {})[kind] = (key, value)
    return value


def forget(gm: fx.GraphModule) -> None:
    """Drops what is remembered of a graph: one of its modules is of another class now, which no key tells."""
    with _LOCK:
        _KNOWN.pop(gm, None)
