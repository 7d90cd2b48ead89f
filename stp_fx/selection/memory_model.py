"""Memory of a plan: bytes of the weights, and of the activations that are alive at once, without running anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.modes import OneMode
from stp_fx.ir.provenance import example_of
from stp_fx.ir.shapes import meta_twin
from stp_fx.rules import Dim, TensorDims, fixed_dims

__all__ = ["MemoryModel", "memory_model"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """Memory that a node of the graph makes: a tensor of these dimensions, alive from node ``born`` to node ``last``."""

    dims: tuple[Dim, ...]
    item: int
    born: int
    last: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MemoryModel:
    """``weights``: shape and bytes of an element by tensor, tied ones once; ``storages``: what a call allocates."""

    weights: dict[str, tuple[tuple[int, ...], int]]
    storages: tuple[_Storage, ...]
    nodes: int

    def __repr__(self) -> str:
        return f"MemoryModel({len(self.weights)} weights, {len(self.storages)} activations)"

    def weight_bytes(self, survivors: Survivors) -> int:
        """Bytes of parameters and buffers that are left."""
        total, axes = 0, survivors.axes
        for name, (shape, item) in self.weights.items():
            sizes = [len(axes[name, dim]) if (name, dim) in axes else size for dim, size in enumerate(shape)]
            total += item * int(np.prod(sizes, dtype=np.int64))
        return total

    def activation_bytes(self, survivors: Survivors) -> int:
        """The most bytes that activations hold at once, for the recorded example."""
        known: dict[tuple[int, ...], int] = {}
        change = np.zeros(self.nodes + 1, dtype=np.int64)
        for storage in self.storages:
            size = storage.item
            for dim in storage.dims:
                key = tuple(id(f.ids) if f.ids is not None else -f.size for f in dim)
                if key not in known:
                    known[key] = int(survivors.flags(dim).sum())
                size *= known[key]
            change[storage.born] += size
            change[storage.last + 1] -= size
        return int(np.cumsum(change).max(initial=0))

    def predict(self, survivors: Survivors) -> float:
        """Bytes of both together."""
        return float(self.weight_bytes(survivors) + self.activation_bytes(survivors))


def memory_model(gm: fx.GraphModule) -> MemoryModel:
    """What an evaluation of the graph keeps in memory: weights and buffers, and what its nodes allocate on the recorded example.

    A value is alive from the node that makes it to the last that reads it or a view of it; inputs and outputs belong to the
    caller and are alive throughout, and to the end. What a node allocates inside and frees again, such as the buffers of a
    convolution, is not seen, and caches of keys and values that a generating loop keeps are not part of a graph.
    """
    graph = analyze(gm)
    weights = {}
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        weights.setdefault(graph.first_name(name), (tuple(tensor.shape), tensor.element_size()))
    run = _Allocations(gm, graph)
    with torch.no_grad(), MetaRun():
        run.run(*example_of(gm))
    return MemoryModel(weights, tuple(run.storages()), len(run.order))


class _Allocations(OneMode):
    """One run on meta tensors that sees which node makes which storage."""

    def __init__(self, gm: fx.GraphModule, graph: ChannelGraph) -> None:
        super().__init__(meta_twin(gm).eval(), gm.graph)
        self.order = {node: k for k, node in enumerate(gm.graph.nodes)}
        self._graph = graph
        self._weights = {_storage(t) for t in (*self.module.parameters(), *self.module.buffers())}
        self._made: dict[int, tuple[tuple[Dim, ...], int, int]] = {}
        self._last: dict[int, int] = {}
        self._held: list[Any] = []  # so that no storage's number is used twice

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._held.append(result)
        tensors = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
        known = list(_values(self._graph.value(n.name)))
        end = len(self.order) - 1
        last = end if n.op in ("placeholder", "output") else max((self.order[user] for user in n.users), default=self.order[n])
        for k, tensor in enumerate(tensors):
            key = _storage(tensor)
            if key in self._weights:
                continue
            if key not in self._made:
                dims = known[k].dims if len(known) == len(tensors) else fixed_dims(tuple(tensor.shape))
                self._made[key] = (dims, tensor.element_size(), self.order[n])
            self._last[key] = max(self._last.get(key, 0), last)
        return result

    def storages(self) -> Iterator[_Storage]:
        for key, (dims, item, born) in self._made.items():
            yield _Storage(dims, item, born, self._last[key])


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _values(value: Any) -> Iterator[TensorDims]:
    if isinstance(value, TensorDims):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _values(each)
