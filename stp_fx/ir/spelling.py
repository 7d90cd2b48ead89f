"""Calls that PyTorch spells in another way than ATen, for graphs that ``torch.export`` gives."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stp_fx.ir.train_eval import attention_with_dropout

__all__ = ["SPELLED"]

SPELLED: dict[str, Callable[[fx.Graph, tuple[Any, ...], dict[str, Any]], Any]] = {}
"""By ``namespace.op``: puts the call of PyTorch's own into a graph."""


def _spelled(*packets: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        SPELLED.update({f"aten.{packet}": function for packet in packets})
        return function

    return register


def _with(target: Any, *kept: int) -> Any:
    """The call of ``target`` with the first of the arguments only."""
    return lambda graph, args, kwargs: graph.call_function(target, args[: kept[0]] if kept else args, kwargs)


SPELLED |= {
    "aten.linear": _with(F.linear), "aten.layer_norm": _with(F.layer_norm, 5), "aten.group_norm": _with(F.group_norm, 5),
    "aten.rms_norm": _with(F.rms_norm), "aten.dropout": _with(F.dropout), "aten.gelu": _with(F.gelu), "aten.silu": _with(F.silu),
    "aten.relu": _with(F.relu), "aten.pad": _with(F.pad), "aten.constant_pad_nd": lambda g, a, k: g.call_function(
        F.pad, (a[0], a[1], "constant", a[2] if len(a) > 2 else 0), k),
    "aten.conv1d": _with(F.conv1d), "aten.conv2d": _with(F.conv2d), "aten.conv3d": _with(F.conv3d),
    "aten.max_pool2d": _with(F.max_pool2d), "aten.avg_pool2d": _with(F.avg_pool2d),
    "aten.adaptive_avg_pool2d": _with(F.adaptive_avg_pool2d), "aten.embedding": lambda g, a, k: g.call_function(
        F.embedding, (a[1], a[0])),
    "aten.where": _with(torch.where), "aten.cat": _with(torch.cat), "aten.stack": _with(torch.stack),
    "aten._to_copy": lambda g, a, k: g.call_method("to", a, k),
}  # fmt: skip


@_spelled("sym_size")
def _size(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return graph.call_method("size", args)


@_spelled("to")
def _to(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return graph.call_method("to", args[:2], kwargs)


@_spelled("slice")
def _slice(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, start, stop, step = _padded(args, (None, 0, None, None, 1))
    stop = None if isinstance(stop, int) and stop > 2**40 else stop
    if start in (0, None) and stop is None and step == 1:
        return x
    return graph.call_function(operator.getitem, (x, _at(dim, slice(start, stop, step))))


@_spelled("select")
def _select(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    x, dim, index = args
    return graph.call_function(operator.getitem, (x, _at(dim, index)))


def _at(dim: int, item: Any) -> tuple[Any, ...]:
    every = slice(None)
    return (*[every] * dim, item) if dim >= 0 else (..., item, *[every] * (-dim - 1))


@_spelled("index")
def _index(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return graph.call_function(operator.getitem, (args[0], tuple(slice(None) if i is None else i for i in args[1])))


@_spelled("batch_norm")
def _batch_norm(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    x, weight, bias, mean, variance, training, momentum, eps = args[:8]
    return graph.call_function(F.batch_norm, (x, mean, variance, weight, bias, training, momentum, eps))


@_spelled("scaled_dot_product_attention")
def _attention(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    q, k, v, mask, dropout, causal = _padded(args, (None, None, None, None, 0.0, False))
    if kwargs.get("enable_gqa"):
        return graph.call_function(F.scaled_dot_product_attention, args, kwargs)
    return graph.call_function(attention_with_dropout, (q, k, v, mask, causal, kwargs["scale"], dropout, dropout > 0.0))


def _padded(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> list[Any]:
    return [*args, *defaults[len(args) :]]


for _name, _operator in {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}.items():
    SPELLED[f"aten.{_name}"] = lambda graph, args, kwargs, _name=_name, _operator=_operator: (
        graph.call_function(getattr(torch, _name), args, kwargs) if kwargs else graph.call_function(_operator, args)
    )
