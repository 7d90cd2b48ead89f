"""Keeping the batch free. A trace runs with a large prime as the batch, so that a number that came from it gives itself away.

Where numbers may have come from it, a second trace runs with another batch. Numbers that are equal in both do not depend on
the batch; those that differ are ``a * batch + b``, and computed from the input's leading size.
If they differ in another way, the graph is bound to one batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from stp_fx.ir.nested import leaves_of, mapped
from stp_fx.ir.shapes import tensors_of

__all__ = [
    "NumbersOfBatch",
    "bakes_batch",
    "batches_for",
    "compares_shapes",
    "free_batch",
    "holds_multiple",
    "same_constants",
    "with_batch",
]

_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)
"""Larger than the channel counts, window sizes and head counts that could be mistaken for a multiple of one."""


_APART = 367
"""From the first batch to the second: a prime, so that rounding (``b // 8 * 8``) is no straight line through both."""


def batches_for(model: nn.Module, values: dict[str, Any]) -> tuple[int, int]:
    """Two batch sizes; no size of a parameter or an input is a multiple of either."""
    inputs = leaves_of(torch.Tensor, list(values.values()))
    sizes = {size for tensor in (*tensors_of(model), *inputs) for size in tensor.shape if size >= _PRIMES[0]}
    free = (p for p in _PRIMES if all(size % p and size % (p + _APART) for size in sizes))
    first = next(free, _PRIMES[0])
    return first, first + _APART


def with_batch(values: dict[str, Any], batch: int) -> dict[str, Any] | None:
    """The values with another leading size; ``None`` if the tensors do not share one, or are all within containers."""
    tensors = leaves_of(torch.Tensor, list(values.values()))
    if not any(isinstance(value, torch.Tensor) for value in values.values()):
        return None
    if not all(t.dim() for t in tensors) or len({t.shape[0] for t in tensors}) != 1:
        return None
    return mapped(torch.Tensor, lambda t: torch.empty((batch, *t.shape[1:]), dtype=t.dtype, device="meta"), values)


def first_tensor(graph: fx.Graph) -> fx.Node:
    """The first input that is a tensor."""
    return next(n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor))


class NumbersOfBatch:
    """Which numbers of a trace come from the batch, whose ``size`` is a prime; 0: it is the example's own, and none is known."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: dict[fx.Node, bool] = {}

    def multiple(self, value: Any) -> bool:
        """Whether a number is a multiple of the batch."""
        whole = isinstance(value, int) and not isinstance(value, bool) and value != 0
        return whole and self.size != 0 and value % self.size == 0

    def made(self, node: fx.Node) -> bool:
        """Whether a number was computed from the batch: it is a multiple of it, or made of one that is."""
        value = node.meta["val"]
        if not self.size or not isinstance(value, (bool, int, float)) or self._divides(node):
            return False
        if node not in self._known:
            self._known[node] = self.multiple(value) or any(self.made(n) for n in node.all_input_nodes)
        return self._known[node]

    def _divides(self, node: fx.Node) -> bool:
        """``4 * b % 2``: no remainder, whatever the batch."""
        if node.target is not operator.mod:
            return False
        number, by = (a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args)
        if (
            not isinstance(number, int)
            or not self.multiple(number)
            or not isinstance(by, int)
            or any(map(self.made, node.all_input_nodes[1:]))
        ):
            return False
        return by != 0 and number // self.size % by == 0

    def compares(self, node: fx.Node) -> bool:
        """``b == b2``, ``2 * b > b``, ``x.shape != (b, 3)``: true or false whatever the batch."""
        sides = [_plain(a) for a in node.args]
        if not compares_shapes(node):
            return all(map(self.multiple, sides))
        return len({len(side) for side in sides}) == 1 and all(
            len({self.multiple(size) for size in sizes}) == 1 for sizes in zip(*sides, strict=True)
        )


def compares_shapes(node: fx.Node) -> bool:
    """Whether a node compares one list of sizes with another."""
    return len(node.args) == 2 and all(isinstance(_plain(a), (tuple, list)) for a in node.args)


def _plain(value: Any) -> Any:
    """The stand-in for a value, with the numbers of nodes in it."""
    value = value.meta["val"] if isinstance(value, fx.Node) else value
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def holds_multiple(graph: fx.Graph, batch: int) -> bool:
    """Whether a number that is written in the graph is a multiple of ``batch``."""
    found: list[int] = []

    def look(value: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value and value % batch == 0:
            found.append(1)

    for node in graph.nodes:
        map_aggregate((node.args, node.kwargs), look)
    return bool(found)


def bakes_batch(constants: Iterable[Any], batch: int) -> bool:
    """Whether a constant tensor of the graph was made as long as the batch; then the batch cannot be freed."""
    return any(isinstance(t, torch.Tensor) and any(size and size % batch == 0 for size in t.shape) for t in constants)


def same_constants(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether two traces have lifted the same tensors out of the code."""
    pairs = list(zip(list(first), list(second), strict=False))
    return all(isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b) for a, b in pairs)


class _Bound(Exception):
    """The two graphs differ in more than numbers of the batch."""


def free_batch(graph: fx.Graph, other: fx.Graph, batches: tuple[int, int]) -> bool:
    """Replaces the numbers in which two traces differ by what they were computed from; whether that was possible.

    ``graph`` was traced with the first of ``batches``, ``other`` with the second. A graph that cannot be freed is left half done.
    """
    first, second = list(graph.nodes), list(other.nodes)
    if [(n.op, n.target) for n in first] != [(n.op, n.target) for n in second]:
        return False
    freed = _Freed(graph, batches, dict(zip(second, first, strict=True)))
    try:
        for one, two in zip(first, second, strict=True):
            if one.op in ("call_function", "call_method", "call_module", "output"):
                args, kwargs = freed.value(one.args, two.args), freed.value(one.kwargs, two.kwargs)
                if args is not one.args or kwargs is not one.kwargs:
                    one.args, one.kwargs = args, kwargs
    except _Bound:
        return False
    return True


class _Freed:
    def __init__(self, graph: fx.Graph, batches: tuple[int, int], twins: dict[fx.Node, fx.Node]) -> None:
        self.graph, self.batches, self.twins = graph, batches, twins
        self.made: dict[tuple[Any, Any], fx.Node] = {}
        self.last = next(n for n in reversed(list(graph.nodes)) if n.op == "placeholder")

    def value(self, one: Any, two: Any) -> Any:
        """``one`` with what differs from ``two`` replaced; ``one`` itself where nothing does."""
        if isinstance(one, fx.Node):
            if self.twins.get(two) is not one:
                raise _Bound
            return one
        if type(one) is not type(two):
            raise _Bound
        if isinstance(one, (list, tuple)):
            return self._items(one, two)
        if isinstance(one, dict):
            items = self._items(list(one.values()), list(two.values()))
            return one if all(a is b for a, b in zip(items, one.values(), strict=True)) else dict(zip(one, items, strict=True))
        if isinstance(one, slice):
            parts = [self.value(getattr(one, name), getattr(two, name)) for name in ("start", "stop", "step")]
            return slice(*parts) if any(isinstance(part, fx.Node) for part in parts) else one
        if one is two or one == two or (one != one and two != two):
            return one
        if isinstance(one, (int, float)) and not isinstance(one, bool):
            return self._regenerated(one, two)
        raise _Bound

    def _items(self, one: Any, two: Any) -> Any:
        if len(one) != len(two):
            raise _Bound
        items = [self.value(a, b) for a, b in zip(one, two, strict=True)]
        return one if all(a is b for a, b in zip(items, one, strict=True)) else type(one)(items)

    def _regenerated(self, one: Any, two: Any) -> fx.Node:
        """``a * batch + b`` with whole ``a`` and ``b``. A curve through both values has an offset as large as the batch."""
        slope = (one - two) / (self.batches[0] - self.batches[1])
        offset = one - slope * self.batches[0]
        if slope != round(slope) or offset != round(offset) or abs(offset) > self.batches[0] // 2:
            raise _Bound
        kind = type(one)
        return self._made(kind(slope), kind(offset))

    def _made(self, slope: Any, offset: Any) -> fx.Node:
        if (slope, offset) not in self.made:
            if not self.made:
                first = first_tensor(self.graph)
                with self.graph.inserting_after(self.last):
                    self.made[1, 0] = self.last = self.graph.call_method("size", (first, 0))
            node = self.made[1, 0]
            for function, number, neutral in ((operator.mul, slope, 1), (operator.add, offset, 0)):
                if number != neutral or isinstance(number, float):
                    with self.graph.inserting_after(self.last):
                        node = self.last = self.graph.call_function(function, (node, number))
            self.made[slope, offset] = node
        return self.made[slope, offset]
