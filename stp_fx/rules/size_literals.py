"""Handlers for calls that spell out sizes: views, new tensors, norms over named shapes, groups."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stp_fx.rules.domain import Dim, has_ids
from stp_fx.rules.literals import Edit, literal

__all__: list[str] = []


def _spelled(edit: Edit, start: int, names: tuple[str, ...]) -> tuple[Any, list[Any], Any] | None:
    """(raw sizes, evaluated sizes, how to write them back) of ``f(x, 1, 2)``, ``f(x, (1, 2))`` or ``f(x, size=(1, 2))``.

    The raw sizes are a node where the graph computes them as one tuple (``x.view(x.size()[:-1] + (3,))``).
    """
    name = next((n for n in names if n in edit.node.kwargs), None)
    if name is not None:
        return edit.node.kwargs[name], list(edit.kwargs[name]), lambda sizes: edit.node.update_kwarg(name, tuple(sizes))
    if start >= len(edit.args) or isinstance(edit.args[start], torch.dtype):
        return None
    if isinstance(edit.args[start], (list, tuple)):
        return edit.node.args[start], list(edit.args[start]), lambda sizes: edit.node.update_arg(start, tuple(sizes))
    head = edit.node.args[:start]
    return list(edit.node.args[start:]), list(edit.args[start:]), lambda sizes: setattr(edit.node, "args", (*head, *sizes))


def _renew(edit: Edit, start: int, names: tuple[str, ...], dims: tuple[Dim, ...], *, infer: bool) -> None:
    """Writes the sizes that are left, where what is written would give others. ``infer``: the call knows ``-1``."""
    spelled = _spelled(edit, start, names)
    if spelled is None:
        return
    raw, values, write = spelled
    expected = [edit.size(dim) for dim in dims]
    wrong = [k for k, (value, size) in enumerate(zip(values, expected, strict=True)) if value not in (size, -1)]
    if not wrong:
        return
    graph, open_size = edit.node.graph, -1 in values
    with graph.inserting_before(edit.node):
        written = _items(graph, raw, len(values)) if isinstance(raw, fx.Node) else list(raw)
        for k in wrong:
            mixed = has_ids(dims[k]) and any(f.ids is None for f in dims[k]) and isinstance(written[k], fx.Node)
            if infer and mixed and not open_size:
                written[k], open_size = -1, True
            elif mixed:  # the batch times heads, say: what is computed, times the share that is left
                share = math.gcd(expected[k], values[k])
                times = graph.call_function(operator.mul, (written[k], expected[k] // share))
                written[k] = graph.call_function(operator.floordiv, (times, values[k] // share))
            else:
                written[k] = expected[k]
    write(written)


def _items(graph: fx.Graph, sizes: fx.Node, count: int) -> list[Any]:
    return [graph.call_function(operator.getitem, (sizes, k)) for k in range(count)]


@literal("view", "reshape", torch.reshape)
def _view(edit: Edit) -> None:
    _renew(edit, 1, ("shape", "size"), edit.result_dims(), infer=True)


@literal("expand", "broadcast_to", torch.broadcast_to)
def _expand(edit: Edit) -> None:
    _renew(edit, 1, ("size",), edit.result_dims(), infer=False)


@literal("new_zeros", "new_ones", "new_empty", "new_full")
def _new(edit: Edit) -> None:
    _renew(edit, 1, ("size",), edit.result_dims(), infer=False)


@literal(torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn)
def _create(edit: Edit) -> None:
    _renew(edit, 0, ("size",), edit.result_dims(), infer=False)


@literal("unflatten", torch.unflatten)
def _unflatten(edit: Edit) -> None:
    at = edit.arg(1, "dim") % len(edit.source)
    sizes = edit.arg(2, "sizes")
    dims = edit.result_dims()[at : at + len(sizes)]
    expected = [edit.size(dim) for dim in dims]
    if any(value not in (size, -1) for value, size in zip(sizes, expected, strict=True)):
        edit.set_arg(2, "sizes", tuple(expected))


def living_groups(edit: Edit, dim: Dim, groups: int) -> int:
    """How many of the ``groups`` outer blocks of a dimension keep any position."""
    return int(edit.keep(dim).reshape(groups, -1).any(axis=1).sum())


@literal(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
@literal(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _conv(edit: Edit) -> None:
    groups = edit.arg(6, "groups", 1)
    if groups > 1 and edit.changed(edit.source[1]):
        edit.set_arg(6, "groups", living_groups(edit, edit.source[1], groups))


@literal(F.group_norm, torch.group_norm)
def _group_norm(edit: Edit) -> None:
    groups = edit.arg(1, "num_groups")
    edit.set_arg(1, "num_groups", living_groups(edit, edit.source[1], groups))


@literal(F.channel_shuffle, torch.channel_shuffle)
def _channel_shuffle(edit: Edit) -> None:
    groups = edit.arg(1, "groups")
    edit.set_arg(1, "groups", living_groups(edit, edit.source[1], groups))


@literal(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def _layer_norm(edit: Edit) -> None:
    shape = list(edit.arg(1, "normalized_shape"))
    expected = [edit.size(dim) for dim in edit.result_dims()[-len(shape) :]]
    if shape != expected:
        edit.set_arg(1, "normalized_shape", tuple(expected))


@literal(F.scaled_dot_product_attention)
def _attention(edit: Edit) -> None:
    """The default scale depends on the head dimension: it stays what it was."""
    if edit.changed(edit.source[-1]) and edit.kwargs.get("scale") is None:
        size = 1
        for factor in edit.source[-1]:
            size *= factor.size
        edit.node.update_kwarg("scale", size**-0.5)
