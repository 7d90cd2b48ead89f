"""Memory of a plan: bytes of the weights, of the activations that are alive at once, and of the keys and values that a generating
loop keeps, without running anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from stp_fx.analysis.attentions import find_attentions
from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.errors import InputError
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.modes import OneMode
from stp_fx.ir.provenance import example_of
from stp_fx.ir.shapes import meta_twin
from stp_fx.rules import Dim, TensorDims, dim_size, fixed_dims

__all__ = ["MemoryModel", "cached_values", "memory_model"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """Memory that a node of the graph makes: a tensor of these dimensions, alive from node ``born`` to node ``last``."""

    dims: tuple[Dim, ...]
    item: int
    born: int
    last: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Cached:
    """Keys or values that an attention keeps: in the example a tensor of these dimensions, for so many tokens."""

    dims: tuple[Dim, ...]
    item: int
    tokens: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MemoryModel:
    """``weights``: shape and bytes of an element by tensor, tied ones once; ``storages``: what a call allocates; ``cached``: the
    keys and values of every attention, of which ``cache_tokens`` are kept for each of ``cache_batch`` sequences."""

    weights: dict[str, tuple[tuple[int, ...], int]]
    storages: tuple[_Storage, ...]
    nodes: int
    cached: tuple[_Cached, ...] = ()
    cache_tokens: int = 0
    cache_batch: int = 1

    def __repr__(self) -> str:
        kept = f", {len(self.cached)} cached keys and values" if self.cached else ""
        return f"MemoryModel({len(self.weights)} weights, {len(self.storages)} activations{kept})"

    def weight_bytes(self, survivors: Survivors) -> int:
        """Bytes of parameters and buffers that are left."""
        total, axes = 0, survivors.axes
        for name, (shape, item) in self.weights.items():
            sizes = [len(axes[name, dim]) if (name, dim) in axes else size for dim, size in enumerate(shape)]
            total += item * int(np.prod(sizes, dtype=np.int64))
        return total

    def activation_bytes(self, survivors: Survivors) -> int:
        """The most bytes that activations hold at once, for the recorded example."""
        length = _Lengths(survivors)
        change = np.zeros(self.nodes + 1, dtype=np.int64)
        for storage in self.storages:
            size = storage.item * length.product(storage.dims)
            change[storage.born] += size
            change[storage.last + 1] -= size
        return int(np.cumsum(change).max(initial=0))

    def cache_bytes(self, survivors: Survivors) -> int:
        """Bytes of the keys and values that are kept for ``cache_batch`` sequences of ``cache_tokens`` tokens."""
        length, kept = _Lengths(survivors), self.cache_batch * self.cache_tokens
        return sum(each.item * (length.product(each.dims) // each.tokens) * kept for each in self.cached)

    def predict(self, survivors: Survivors) -> float:
        """Bytes of all together."""
        return float(self.weight_bytes(survivors) + self.activation_bytes(survivors) + self.cache_bytes(survivors))


def memory_model(gm: fx.GraphModule, *, cache_tokens: int = 0, cache_batch: int = 1) -> MemoryModel:
    """The memory of an evaluation of the graph: weights and buffers, what its nodes allocate on the recorded example, and,
    of a decoder, the keys and values of ``cache_batch`` sequences of ``cache_tokens`` tokens.

    A value is alive from the node that makes it to the last that reads it or a view of it; inputs and outputs belong to the
    caller and are alive throughout, and to the end. Memory that a node allocates inside and frees again, such as the buffers of a
    convolution, does not count.

    The cache is one that a generating loop keeps outside of the graph: for each self-attention that is causal or has a mask, keys
    and values as they enter it, in their dtype, once for all query heads that share them, and once for all attentions that read
    the same. The keys and values of an encoder, and the encoder's own attentions, do not count. Windows that bound a cache are
    not known (where all layers have one, give its length as ``cache_tokens``), nor that a model keeps something smaller of which
    it computes keys and values anew (latents).

    Raises:
        InputError: a cache is asked for and no attention has one, or its keys and values cannot be told apart by token.
    """
    graph = analyze(gm)
    weights = {}
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        weights.setdefault(graph.first_name(name), (tuple(tensor.shape), tensor.element_size()))
    run = _Allocations(gm, graph)
    with torch.no_grad(), MetaRun():
        run.run(*example_of(gm))
    cached = (
        [_Cached(dims, run.items[name], tokens) for name, (dims, tokens) in cached_values(gm).items()] if cache_tokens else []
    )
    return MemoryModel(weights, tuple(run.storages()), len(run.order), tuple(cached), cache_tokens, cache_batch)


def cached_values(gm: fx.GraphModule) -> dict[str, tuple[tuple[Dim, ...], int]]:
    """The nodes that give the keys and values that a decoder keeps: their dimensions, and their tokens in the example.

    Raises:
        InputError: there are none, or one whose tokens cannot be told apart.
    """
    graph, found = analyze(gm), dict[str, tuple[tuple[Dim, ...], int]]()
    for attention in find_attentions(gm):
        for name in (attention.key, attention.value) if attention.decodes else ():
            dims, tokens = graph.value(name).dims, attention.batch * attention.tokens
            if math.prod(map(dim_size, dims)) % tokens:
                raise InputError(
                    f"`cache_tokens` cannot count what '{attention.node}' keeps: '{name}' does not divide into the example's "
                    f"{tokens} tokens; leave `cache_tokens` out, or trace with another example"
                )
            found[name] = dims, tokens
    if not found:
        raise InputError(
            "`cache_tokens` counts keys and values that a decoder keeps, and no self-attention of the graph is causal or has a "
            "mask; leave it out"
        )
    return found


class _Lengths:
    """How many positions survive along dimensions, each worked out once."""

    def __init__(self, survivors: Survivors) -> None:
        self._survivors, self._known = survivors, dict[tuple[int, ...], int]()

    def product(self, dims: Sequence[Dim]) -> int:
        size = 1
        for dim in dims:
            key = tuple(id(f.ids) if f.ids is not None else -f.size for f in dim)
            if key not in self._known:
                self._known[key] = int(self._survivors.flags(dim).sum())
            size *= self._known[key]
        return size


class _Allocations(OneMode):
    """One run on meta tensors that sees which node makes which storage."""

    def __init__(self, gm: fx.GraphModule, graph: ChannelGraph) -> None:
        super().__init__(meta_twin(gm).eval(), gm.graph)
        self.order = {node: k for k, node in enumerate(gm.graph.nodes)}
        self._graph = graph
        self._weights = {_storage(t) for t in (*self.module.parameters(), *self.module.buffers())}
        self._made: dict[int, tuple[tuple[Dim, ...], int, int]] = {}
        self._last: dict[int, int] = {}
        self.items: dict[str, int] = {}
        """Bytes of an element, by node."""
        self._held: list[Any] = []  # so that no storage's number is used twice

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._held.append(result)
        tensors = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
        if isinstance(result, torch.Tensor):
            self.items[n.name] = result.element_size()
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
