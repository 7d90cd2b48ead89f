"""Branches of caches: ``if self.shape != shape: self.grid, self.shape = make(x), shape``.

A capture makes anew what such a branch makes. The graph then needs no assertion that the key differs from the one of the last
call of the model, which may well have been a call with the example.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["drop_cache_guards"]

Replaced = Iterable[tuple[Any, Any]]


def drop_cache_guards(graph: fx.Graph, replaced: Replaced) -> None:
    """Erases assertions about whether a value is that of an attribute, where the forward then has assigned it to the attribute.

    ``replaced`` are the values of attributes before the trace, and those that they have now, which hold proxies.
    """
    keys = [pair for before, now in replaced for pair in _pairs(before, now)]
    for node in reversed(graph.nodes) if keys else ():
        if node.target is torch._assert and isinstance(node.args[0], fx.Node) and _compares(node.args[0], keys):
            condition = node.args[0]
            graph.erase_node(node)
            while not condition.users:
                graph.erase_node(condition)
                inner = condition.args[0]
                if not _is_comparison(inner):
                    break
                condition = inner


def _pairs(before: Any, now: Any) -> Iterator[tuple[Any, fx.Node]]:
    """The old value of each proxy in a new value of the same structure."""
    if isinstance(now, fx.Proxy):
        yield before, now.node
    elif isinstance(now, (list, tuple)) and isinstance(before, (list, tuple)):
        for one, other in zip(before, now):
            yield from _pairs(one, other)


def _compares(condition: fx.Node, keys: list[tuple[Any, fx.Node]]) -> bool:
    """``now == before``, ``now != before``, or that this is true or false."""
    if not _is_comparison(condition):
        return False
    first, second = condition.args
    if isinstance(first, fx.Node) and isinstance(second, bool) and _is_comparison(first):
        return _compares(first, keys)
    node, value = (first, second) if isinstance(first, fx.Node) else (second, first)
    return any(node is now and _same(value, before) for before, now in keys)


def _is_comparison(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (operator.eq, operator.ne)


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(before, (list, tuple)):
        return len(value) == len(before) and all(map(_same, value, before))
    return type(value) in (int, float, str, bool) and type(value) is type(before) and value == before
