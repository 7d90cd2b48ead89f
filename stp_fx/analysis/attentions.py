"""Attentions of a graph, however they are written: which values enter as keys and as values.

Two forms: one call of ``F.scaled_dot_product_attention``, or a softmax between two products (matmul, bmm, einsum), as models
write it out. Keys and values are followed back through views, transposes and the repetition that lets several query heads share
them, to where they have the fewest numbers: that is what a cache of a generating loop keeps.

A cache holds those of a decoder's self-attentions. Which these are follows from which attentions lie before the queries and
before the keys: the same in a self-attention; other ones where a decoder reads an encoder, and what lies before such keys alone
is the encoder.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.ir.modes import graph_of_mode
from stp_fx.ir.provenance import example_of
from stp_fx.ir.train_eval import attention_with_dropout
from stp_fx.rules import TensorDims, dim_size
from stp_fx.rules.edit import Signature

__all__ = ["Attention", "find_attentions"]

_FUSED = Signature.of("query key value attn_mask dropout_p is_causal")
_WITH_DROPOUT = Signature.of("query key value attn_mask is_causal")
_CALLS = {F.scaled_dot_product_attention: _FUSED, attention_with_dropout: _WITH_DROPOUT}
_PRODUCTS = {operator.matmul, torch.matmul, torch.bmm, torch.einsum, torch.baddbmm, "matmul", "bmm", "baddbmm", "__matmul__"}
_SOFTMAX = {F.softmax, torch.softmax, "softmax"}
_VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "contiguous", "expand", "expand_as", "unsqueeze", "squeeze", "flatten",
    "unflatten", "repeat_interleave", "repeat", "movedim", "moveaxis", "swapaxes", "swapdims", "broadcast_to", "clone", "to",
    "type_as", "float", "half", "bfloat16", "mT", "T", "getattr", "getitem", "t",
})  # fmt: skip
"""Calls that show, order or repeat what is there; ``getitem`` of a list is none, since that gives another tensor."""


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """One attention. ``node`` gives its result; ``query``, ``key`` and ``value`` are the nodes that give these, keys and values
    once for all queries that share them. ``batch`` and ``tokens``: sequences, and keys a sequence, for the recorded example.
    ``masked``: it is causal or has a mask (or a bias). ``decodes``: it is one whose keys and values a decoder keeps."""

    node: str
    query: str
    key: str
    value: str
    batch: int
    tokens: int
    masked: bool
    decodes: bool = False


def find_attentions(gm: fx.GraphModule) -> tuple[Attention, ...]:
    """The attentions that ``gm`` runs in evaluation, in graph order.

    Raises:
        InputError: ``gm`` carries no recorded example inputs.
    """
    return tuple(_Finder(gm).all())


class _Finder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._graph: ChannelGraph = analyze(gm)
        self._nodes = list(graph_of_mode(gm.graph, training=False).nodes)  # without marks and choices, under the same names
        first = next((v for v in example_of(gm) if isinstance(v, torch.Tensor) and v.dim()), None)
        self._batch = 1 if first is None else int(first.shape[0])

    def all(self) -> Iterator[Attention]:
        made = [self._fused(n) if n.target in _CALLS else self._written_out(n) if self._softmax(n) else None for n in self._nodes]
        found = [each for each in made if each is not None]
        before = self._attentions_before(found)
        sides = [(before[each.query], before[each.key]) for each in found]
        of_encoders = 0
        for queries, keys in sides:
            of_encoders |= keys & ~queries
        for k, (each, (queries, keys)) in enumerate(zip(found, sides, strict=True)):
            yield dataclasses.replace(each, decodes=each.masked and queries == keys and not of_encoders >> k & 1)

    def _attentions_before(self, found: list[Attention]) -> dict[str, int]:
        """By node, a number whose bit k is set if attention k is among what the node is computed from."""
        own, result = {each.node: 1 << k for k, each in enumerate(found)}, dict[str, int]()
        for node in self._nodes:
            bits = own.get(node.name, 0)
            for each in node.all_input_nodes:
                bits |= result[each.name]
            result[node.name] = bits
        return result

    def _fused(self, node: fx.Node) -> Attention | None:
        given = {name: _at(node, where) for name, where in _CALLS[node.target].bind(node.args, node.kwargs).items()}  # type: ignore[index]
        query, key, value = (given.get(name) for name in ("query", "key", "value"))
        shapes = [self._shape(each) for each in (query, key)]
        if shapes[0] is None or shapes[1] is None or not isinstance(value, fx.Node):
            return None
        masked = given.get("attn_mask") is not None or bool(given.get("is_causal", False))
        return self._made(node, (query, key, value), (*shapes[0][:-1], shapes[1][-2]), masked)

    def _written_out(self, softmax: fx.Node) -> Attention | None:
        """From the softmax back to the scores, and on to the product with the values."""
        scores, masked = self._back_to_product(softmax.all_input_nodes[0])
        weights, product = self._on_to_product(softmax)
        shape = self._shape(softmax)
        if scores is None or product is None or shape is None:
            return None
        factors = _factors(scores)
        values = [each for each in _factors(product) if each is not weights]
        if len(factors) != 2 or len(values) != 1:
            return None
        at = _place_of_keys(scores)
        operands = factors[1 - at], factors[at], values[0]
        return self._made(product, operands, shape, masked or scores.target in (torch.baddbmm, "baddbmm"))

    def _made(self, node: fx.Node, operands: tuple[Any, ...], scores: tuple[int, ...], masked: bool) -> Attention:
        query, key, value = operands
        rank, first = len(scores), scores[0]
        batch = first if rank > 3 or first % self._batch else self._batch  # heads may lie in the batch
        return Attention(node.name, query.name, self._source(key).name, self._source(value).name, batch, scores[-1], masked)

    def _softmax(self, node: fx.Node) -> bool:
        """Whether a node is a softmax over the last dimension."""
        if node.op == "call_module":
            module = self._gm.get_submodule(str(node.target))
            return isinstance(module, nn.Softmax) and module.dim in (-1, self._rank(node) - 1)
        if node.target not in _SOFTMAX:
            return False
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dim in (-1, self._rank(node) - 1)

    def _back_to_product(self, node: fx.Node) -> tuple[fx.Node | None, bool]:
        """The product that gives the scores, and whether something is added to them or masks them on the way."""
        masked = False
        while node.target not in _PRODUCTS:
            tensors = [each for each in node.all_input_nodes if self._shape(each)]
            alike = [each for each in tensors if self._size(each) == self._size(node)]
            if node.op not in ("call_function", "call_method", "call_module") or not alike:
                return None, masked
            before = next((each for each in alike if self._leads(each)), alike[0])
            masked = masked or any(self._rank(each) > 1 for each in tensors if each is not before)
            node = before
        return node, masked

    def _leads(self, node: fx.Node) -> bool:
        """Whether a product gives this value, through values of as many numbers."""
        seen = [node]
        for each in seen:
            if each.target in _PRODUCTS:
                return True
            seen += [n for n in each.all_input_nodes if self._size(n) == self._size(node) and n not in seen]
        return False

    def _on_to_product(self, weights: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The part of the weights that enters the product with the values, and this product."""
        while True:
            readers = list(weights.users)
            product = next((each for each in readers if each.target in _PRODUCTS), None)
            following = [each for each in readers if self._size(each) == self._size(weights)]
            if product is not None or not following:
                return weights, product
            weights = following[0]

    def _source(self, node: fx.Node) -> fx.Node:
        """Where the numbers of ``node`` are fewest, going back through views and repetitions; the last of equals."""
        found = node
        while _name(node) in _VIEWS and isinstance(node.args[0], fx.Node):
            before = node.args[0]
            size = self._size(before)
            if size is None or size > (self._size(node) or 0):
                break
            if size < (self._size(found) or 0):
                found = before
            node = before
        return found

    # -- shapes ------------------------------------------------------------------------------------------------------

    def _shape(self, node: object) -> tuple[int, ...] | None:
        value = self._graph.value(node.name) if isinstance(node, fx.Node) else None
        return tuple(dim_size(dim) for dim in value.dims) if isinstance(value, TensorDims) else None

    def _size(self, node: fx.Node) -> int | None:
        shape = self._shape(node)
        return None if shape is None else int(torch.Size(shape).numel())

    def _rank(self, node: fx.Node) -> int:
        return len(self._shape(node) or ())


def _at(node: fx.Node, where: int | str) -> Any:
    return node.args[where] if isinstance(where, int) else node.kwargs[where]


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _factors(product: fx.Node) -> list[fx.Node]:
    """The two values that a product multiplies."""
    arguments = [each for each in (*product.args, *product.kwargs.values()) if isinstance(each, fx.Node)]
    listed = [each for group in product.args if isinstance(group, (list, tuple)) for each in group if isinstance(each, fx.Node)]
    return (arguments + listed)[-2:]


def _place_of_keys(scores: fx.Node) -> int:
    """Which factor has the last dimension of the scores, over which the softmax runs: the second of a matrix product, and of an
    einsum that whose letters have the result's last."""
    equation = scores.args[0]
    if scores.target is torch.einsum and isinstance(equation, str) and "->" in equation:
        inputs, _, result = equation.replace(" ", "").partition("->")
        return int(result[-1:] not in inputs.split(",")[0])
    return 1
