"""Numbers that a graph computes from sizes, and what they would be without the removal.

A number has two readings once channels are removed. As a size it takes the new value. In arithmetic, in a condition, or as
a position along another axis it keeps the old one, and what it has of the batch or the image still follows the input: the
network computes what it computed. :meth:`Numbers.as_before` writes the second reading into the graph: sizes of shortened axes
become the numbers that they were, sizes that mix channels with others are scaled back, and what is computed from them
is computed again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.ir.runner import call, operands
from stp_fx.rules import FIXED, Dim, Dims, TensorDims, dim_size

__all__ = ["Numbers", "drop_dead_numbers"]

_PURE = {getattr, len, max, min, sum, abs, round, divmod, pow, int, float, bool, tuple, list}
_IMPURE = {
    operator.setitem,
    operator.delitem,
    *(f for n, f in vars(operator).items() if n.startswith("i") and n[1:] in dir(operator)),
}
"""Functions of ``operator`` that write into their operand (``iadd``)."""
_PRODUCTS = ("numel", "nelement", "stride", "__len__")
"""Methods of tensors that give a product of sizes."""


class Numbers:
    """The numbers of one graph under a rewrite: ``env`` holds its new values, ``keep`` the positions that stay."""

    def __init__(
        self, gm: fx.GraphModule, graph: ChannelGraph, keep: Callable[[Dim], np.ndarray], env: Mapping[fx.Node, Any]
    ) -> None:
        self.gm, self.graph, self.keep, self.env = gm, graph, keep, env
        self._made: dict[fx.Node, Any] = {}
        self._old: dict[fx.Node, Any] = {}

    # -- the value that it was -------------------------------------------------------------------------------------

    def old(self, node: fx.Node) -> Any:
        """The earlier value of a node: a number, a tuple of them; tensors are as they are now."""
        known = self.graph.value(node.name)
        if isinstance(known, (int, float)):
            return known
        if isinstance(known, list) and all(isinstance(each, (int, float)) for each in known):
            return tuple(known)
        if known is not None or node.op not in ("call_function", "call_method"):
            return self.env[node]
        if node not in self._old:
            self._old[node] = self._computed(node)
        return self._old[node]

    def _computed(self, node: fx.Node) -> Any:
        dims = self._tensor(node)
        if dims is not None and _reads_shape(node):
            return torch.Size(map(dim_size, dims))
        if any(self._dims(each) is not None for each in node.all_input_nodes):
            return self.env[node]
        try:
            return call(node, *operands(node, self.old), self.gm.get_submodule)
        except Exception:  # such as a dtype compared with a string: no number
            return self.env[node]

    def _dims(self, node: Any) -> Dims | None:
        value = self.graph.value(node.name) if isinstance(node, fx.Node) else None
        return value.dims if isinstance(value, TensorDims) else None

    def _tensor(self, node: fx.Node) -> Dims | None:
        """The dimensions of the tensor that a node reads sizes of."""
        return self._dims(node.args[0] if node.args else node.kwargs.get("input"))

    # -- the same in the graph -------------------------------------------------------------------------------------

    def affected(self, node: fx.Node) -> bool:
        """Whether a number, or a tuple of numbers, is computed from the size of a shortened axis."""
        return self.as_before(node) is not node

    def as_before(self, node: fx.Node) -> Any:
        """The value of a number without the removal: a node of the graph, a number, or a tuple of both."""
        if node not in self._made:
            self._made[node] = self._rebuilt(node)
        return self._made[node]

    def settle(self, node: fx.Node) -> None:
        """Lets ``node`` itself give what it would give without the removal, for it cannot be computed from the new sizes."""
        node.args, node.kwargs = map_arg((node.args, dict(node.kwargs)), self.as_before)  # type: ignore[assignment]
        self._made[node] = node

    def _rebuilt(self, node: fx.Node) -> Any:
        if node.op not in ("call_function", "call_method") or isinstance(self.graph.value(node.name), TensorDims):
            return node
        dims = self._tensor(node)
        if dims is not None:
            return self._size_read(node, dims)
        args, kwargs = operands(node, self.as_before)
        if all(self.as_before(each) is each for each in node.all_input_nodes):
            return node
        if node.target is operator.getitem and isinstance(args[0], tuple) and not _holds_node(args[1]):
            return args[0][args[1]]
        if not _holds_node((args, kwargs)) or (node.op == "call_method" and node.target != "numel"):
            return self.old(node)
        return self._create(node, math.prod if node.op == "call_method" else node.target, args, kwargs)

    def _size_read(self, node: fx.Node, dims: Dims) -> Any:
        """A node that reads sizes of a tensor."""
        if _reads_shape(node):
            if not any(self._shortened(dim) for dim in dims):
                return node
            return tuple(self._one_size(node, dim, k) for k, dim in enumerate(dims))
        before, now = self.graph.value(node.name), self.env[node]
        if not isinstance(before, int) or before == now:
            return node
        if node.target == "size":
            at = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
            return self._scaled(node, dims[at], before, now) if isinstance(at, int) else before
        if node.target in _PRODUCTS or node.target in (torch.numel, len):
            return self._share(node, before, now)
        return before

    def _one_size(self, shape: fx.Node, dim: Dim, k: int) -> Any:
        if not self._shortened(dim) and all(factor.ids is not None for factor in dim):
            return dim_size(dim)
        with self.gm.graph.inserting_after(shape):
            item = self.gm.graph.call_function(operator.getitem, (shape, k))
        return self._scaled(item, dim, dim_size(dim), int(self.keep(dim).sum()) if dim else 1)

    def _shortened(self, dim: Dim) -> bool:
        return bool(dim) and not self.keep(dim).all()

    def _scaled(self, node: fx.Node, dim: Dim, before: int, now: int) -> Any:
        """The size of one axis: a number if it is of channels alone."""
        if before == now:
            return node
        if any(factor.ids is None for factor in dim):
            return self._share(node, before, now)
        if len(dim) == 1 and (dim[0].ids == FIXED).any():  # channels joined to positions that follow the input
            return self._create(node, operator.add, (node, before - now), {})
        return before

    def _share(self, node: fx.Node, before: int, now: int) -> Any:
        share = math.gcd(before, now)
        times = self._create(node, operator.mul, (node, before // share), {})
        return times if share == now else self._create(times, operator.floordiv, (times, now // share), {})

    def _create(self, after: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A call of numbers, which all stand before ``after`` or are it."""
        with self.gm.graph.inserting_after(after):
            return self.gm.graph.call_function(target, tuple(args), dict(kwargs))


def _reads_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(value, lambda node: found.append(node) or node)
    return bool(found)


def drop_dead_numbers(gm: fx.GraphModule) -> None:
    """Erases numbers that nothing uses any more, and the sizes that they were computed from."""
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and _is_pure(node):
            gm.graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", *_PRODUCTS)
    target: Any = node.target
    return node.op == "call_function" and (
        target in _PURE or (getattr(target, "__module__", "") in ("math", "_operator") and target not in _IMPURE)
    )
