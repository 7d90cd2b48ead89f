"""Calls that PyTorch spells in another way than ATen, for graphs that ``torch.export`` gives."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stp_fx.ir.export_calls import feature_dropout_in_mode, instance_norm_in_mode, recurrent_in_mode
from stp_fx.ir.train_eval import attention_with_dropout

__all__ = ["SPELLED"]

SPELLED: dict[str, Callable[[fx.Graph, tuple[Any, ...], dict[str, Any], dict[str, Any]], Any]] = {}
"""By ``namespace.op``: puts the call of PyTorch's own into a graph. Given are arguments as written, and all of them by name;
``NotImplemented`` says that this call has no other spelling."""


def _spelled(*packets: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        SPELLED.update({f"aten.{packet}": function for packet in packets})
        return function

    return register


def _with(target: Any, *kept: int, **more: Any) -> Any:
    """The call of ``target`` with the first of the arguments only, and ``more``."""
    return lambda graph, args, kwargs, _: graph.call_function(target, args[: kept[0]] if kept else args, kwargs | more)


def _named(target: Any, *names: str, **more: Any) -> Any:
    """The call of ``target`` with the arguments of these names, in this order, and ``more`` by name."""
    return lambda graph, args, kwargs, every: graph.call_function(target, tuple(every[name] for name in names), dict(more))


SPELLED |= {
    "aten.linear": _with(F.linear), "aten.layer_norm": _with(F.layer_norm, 5), "aten.group_norm": _with(F.group_norm, 5),
    "aten.rms_norm": _with(F.rms_norm), "aten.gelu": _with(F.gelu), "aten.silu": _with(F.silu),
    "aten.relu": _with(F.relu), "aten.pad": _with(F.pad), "aten.constant_pad_nd": lambda g, a, k, _: g.call_function(
        F.pad, (a[0], a[1], "constant", a[2] if len(a) > 2 else 0), k),
    "aten.conv1d": _with(F.conv1d), "aten.conv2d": _with(F.conv2d), "aten.conv3d": _with(F.conv3d),
    "aten.max_pool2d": _with(F.max_pool2d), "aten.avg_pool2d": _with(F.avg_pool2d),
    "aten.adaptive_avg_pool2d": _with(F.adaptive_avg_pool2d),
    "aten.adaptive_max_pool2d": _with(F.adaptive_max_pool2d, return_indices=True),
    "aten.adaptive_max_pool3d": _with(F.adaptive_max_pool3d, return_indices=True),
    "aten.max_pool2d_with_indices": _with(F.max_pool2d, return_indices=True),
    "aten.max_pool3d_with_indices": _with(F.max_pool3d, return_indices=True),
    "aten.prelu": _with(F.prelu), "aten.im2col": _with(F.unfold), "aten.col2im": _with(F.fold),
    "aten.where": _with(torch.where), "aten.cat": _with(torch.cat), "aten.stack": _with(torch.stack),
    "aten.dropout": _named(F.dropout, "input", "p", "train"),
    "aten.dropout_": _named(F.dropout, "self", "p", "train", inplace=True),
    "aten.alpha_dropout": _named(F.alpha_dropout, "input", "p", "train"),
    "aten.alpha_dropout_": _named(F.alpha_dropout, "self", "p", "train", inplace=True),
    "aten.feature_alpha_dropout": _named(F.feature_alpha_dropout, "input", "p", "train"),
    "aten.feature_alpha_dropout_": _named(F.feature_alpha_dropout, "self", "p", "train", inplace=True),
    "aten.feature_dropout": _named(feature_dropout_in_mode, "input", "p", "train"),
    "aten.feature_dropout_": _named(feature_dropout_in_mode, "self", "p", "train", inplace=True),
    "aten.rrelu": _named(F.rrelu, "self", "lower", "upper", "training"),
    "aten.rrelu_": _named(F.rrelu, "self", "lower", "upper", "training", inplace=True),
}  # fmt: skip


@_spelled("embedding")
def _embedding(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    padding = every["padding_idx"]
    named: dict[str, Any] = {name: True for name in ("scale_grad_by_freq", "sparse") if every[name]}
    named |= {"padding_idx": padding} if padding != -1 else {}
    return graph.call_function(F.embedding, (every["indices"], every["weight"]), named)


@_spelled("instance_norm")
def _instance_norm(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    x, weight, bias, mean, var, inputs, momentum, eps = list(every.values())[:8]
    if mean is None:
        return graph.call_function(F.instance_norm, (x, None, None, weight, bias, inputs, momentum, eps))
    return graph.call_function(instance_norm_in_mode, (x, mean, var, weight, bias, momentum, eps, inputs))


@_spelled("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> Any:
    if "batch_sizes" in every or not every["dropout"]:
        return NotImplemented
    return graph.call_function(recurrent_in_mode, (
        every["op"], every["input"], every["hx"], every["params"],
        every["has_biases"], every["num_layers"], every["dropout"], every["bidirectional"], every["batch_first"], every["train"],
    ))  # fmt: skip


@_spelled("index_put_")
def _index_put(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> Any:
    if every["accumulate"]:
        return NotImplemented
    index = tuple(slice(None) if i is None else i for i in every["indices"])
    return graph.call_function(operator.setitem, (every["self"], index, every["values"]))


@_spelled("sym_size")
def _size(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    return graph.call_method("size", args)


@_spelled("to", "_to_copy")
def _to(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    """Only what was asked for: ``copy`` makes another tensor even where nothing changes."""
    copies = every.get("copy", True)  # `_to_copy` always does
    if "other" in every:
        return graph.call_method("to", (args[0], every["other"]), {"copy": True} if copies else {})
    named = {k: kwargs.get(k, every.get(k)) for k in ("device", "dtype", "memory_format")}
    named = {k: v for k, v in named.items() if v is not None and v is not torch.preserve_format}
    return graph.call_method("to", (args[0],), named | ({"copy": True} if copies else {}))


@_spelled("slice")
def _slice(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> Any:
    x, dim, start, stop, step = _padded(args, (None, 0, None, None, 1))
    stop = None if isinstance(stop, int) and stop > 2**40 else stop
    if start in (0, None) and stop is None and step == 1:
        return x
    return graph.call_function(operator.getitem, (x, _at(dim, slice(start, stop, step))))


@_spelled("select")
def _select(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    x, dim, index = args
    return graph.call_function(operator.getitem, (x, _at(dim, index)))


def _at(dim: int, item: Any) -> tuple[Any, ...]:
    every = slice(None)
    return (*[every] * dim, item) if dim >= 0 else (..., item, *[every] * (-dim - 1))


@_spelled("index")
def _index(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    return graph.call_function(operator.getitem, (args[0], tuple(slice(None) if i is None else i for i in args[1])))


@_spelled("batch_norm")
def _batch_norm(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    x, weight, bias, mean, variance, training, momentum, eps = args[:8]
    return graph.call_function(F.batch_norm, (x, mean, variance, weight, bias, training, momentum, eps))


@_spelled("scaled_dot_product_attention")
def _attention(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], every: dict[str, Any]) -> fx.Node:
    q, k, v, mask, dropout, causal = _padded(args, (None, None, None, None, 0.0, False))
    if kwargs.get("enable_gqa"):
        return graph.call_function(F.scaled_dot_product_attention, args, kwargs)
    return graph.call_function(attention_with_dropout, (q, k, v, mask, causal, kwargs["scale"], dropout, dropout > 0.0))


def _padded(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> list[Any]:
    return [*args, *defaults[len(args) :]]


for _name, _operator in {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}.items():
    SPELLED[f"aten.{_name}"] = lambda graph, args, kwargs, every, _name=_name, _operator=_operator: (
        graph.call_function(getattr(torch, _name), args, kwargs) if kwargs else graph.call_function(_operator, args)
    )
