"""Consumers: linear and convolution calls that read an activation along a weight's input axis, as functions of it.

A consumer's weight is seen as ``[groups, out, in, taps]``, whatever module or call it belongs to; position p of the input
is ``divmod(p, in)``: its group, and its place there.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from stp_fx.analysis.sites import Site, find_sites
from stp_fx.analysis.windows import Windows
from stp_fx.ir.runner import run_node
from stp_fx.ir.shapes import fetch

__all__ = ["Consumer", "find_consumers", "linear_calls"]

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_PRODUCTS = {operator.matmul, torch.matmul, torch.mm}


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """A contraction of a value with stored weights.

    ``call(input, weight)`` is its output without bias, in any dtype; ``current(gm)`` the value of its weight. ``weight``
    and ``bias`` name its parameters, None where it has none or computes it from others. ``channel`` is the output's
    channel dimension, ``across`` says that the weight is [in, out]. ``module`` is None for a function call. ``windows``: what
    each output position of a convolution reads; None for a linear layer, and where an option is computed.
    """

    site: Site
    node: str
    call: Call
    current: Callable[[fx.GraphModule], torch.Tensor]
    weight: str | None
    bias: str | None
    channel: int
    groups: int = 1
    transposed: bool = False
    across: bool = False
    module: nn.Module | None = None
    windows: Windows | None = None

    @property
    def overlaps(self) -> bool:
        """Whether one output of a transposed convolution may come from several inputs."""
        module = self.module
        if not isinstance(module, _ConvTransposeNd):
            return False
        return any((k - 1) * d + 1 > s for k, d, s in zip(module.kernel_size, module.dilation, module.stride, strict=True))

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` as [groups, out, in, taps] (a view where strides allow one)."""
        if self.across:
            return weight.t()[None, :, :, None]
        if weight.dim() == 2:
            return weight[None, :, :, None]
        if self.transposed:
            return weight.reshape(self.groups, -1, weight.shape[1], weight[0, 0].numel()).permute(0, 2, 1, 3)
        return weight.reshape(self.groups, -1, weight.shape[1], weight[0, 0].numel())

    def like(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`: the parameter's own layout, dtype and device."""
        if self.across:
            return matrix[0, :, :, 0].t().to(weight)
        if self.transposed:
            matrix = matrix.permute(0, 2, 1, 3)
        return matrix.reshape(weight.shape).to(weight)

    def patches(self, value: torch.Tensor) -> torch.Tensor | None:
        """The input patch of each output position of a convolution: [n, in x taps, positions]; None for other calls."""
        windows = self.windows
        if not isinstance(self.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or windows is None:
            return None
        if value.dim() != len(windows.kernel) + 2:
            return None
        if isinstance(self.module, nn.Conv2d):
            value = F.pad(value, windows.padding, mode=windows.mode)
            return F.unfold(value, windows.kernel, dilation=windows.dilation, stride=windows.stride)
        value, rank = windows.over(value), len(windows.kernel)
        value = value.permute(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
        return value.flatten(1, 1 + rank).flatten(2)


def find_consumers(gm: fx.GraphModule) -> list[Consumer]:
    """All consumers of a captured graph, in graph order. A product of two activations is none."""
    nodes = {node.name: node for node in gm.graph.nodes}
    found = []
    for site in find_sites(gm).all:
        consumer = _consumer(gm, site, nodes[site.reader], nodes[site.source])
        if consumer is not None:
            found.append(consumer)
    return found


def linear_calls(gm: fx.GraphModule) -> list[Consumer]:
    """Every linear layer and convolution of a graph, in graph order, whether channels of its input can be removed or not.
    Their ``site`` names the call, the source and the dimension; it has no shape and no units."""
    found, nothing = [], np.empty(0, dtype=np.int64)
    for node in gm.graph.nodes:
        source = _read_by(node)
        if source is None:
            continue
        consumer = _consumer(gm, Site(node.name, source.name, -1, (), nothing, nothing, ()), node, source)
        if consumer is not None:
            found.append(dataclasses.replace(consumer, site=dataclasses.replace(consumer.site, dim=consumer.channel)))
    return found


def _consumer(gm: fx.GraphModule, site: Site, node: fx.Node, source: fx.Node) -> Consumer | None:
    if node.op == "call_module":
        return _of_module(site, node, source, fetch(gm, str(node.target)))
    if node.op == "call_function" and _read_by(node) is source:
        if node.target is F.linear:
            return _of_call(gm, site, node, -1)
        if node.target in _CONVOLUTIONS:
            return _of_call(gm, site, node, 1)
        if node.target in _PRODUCTS or node.target is torch.addmm:
            return _of_product(gm, site, node)
    return None


def _read_by(node: fx.Node) -> fx.Node | None:
    """The value that a call multiplies with its weight, if it is a linear layer or a convolution."""
    place = 1 if node.target is torch.addmm else 0
    source = node.args[place] if node.op in ("call_module", "call_function") and len(node.args) > place else None
    return source if isinstance(source, fx.Node) else None


def _of_module(site: Site, node: fx.Node, source: fx.Node, module: nn.Module) -> Consumer | None:
    if tuple(node.all_input_nodes) != (source,) or module._forward_pre_hooks or module._forward_hooks:
        return None
    named = {
        kind: f"{node.target}.{kind}" if isinstance(module._parameters.get(kind), nn.Parameter) else None
        for kind in ("weight", "bias")
    }
    target = str(node.target)
    common = {"site": site, "node": node.name, "module": module, "current": lambda gm: fetch(gm, target).weight, **named}
    if type(module).forward is nn.Linear.forward:
        return Consumer(call=lambda x, w: F.linear(x, w), channel=-1, **common)
    if isinstance(module, _ConvTransposeNd):
        windows = Windows.of_module(module)
        return Consumer(
            call=_transposed_call(module), channel=1, groups=module.groups, transposed=True, windows=windows, **common
        )
    if isinstance(module, _ConvNd):
        return Consumer(
            call=lambda x, w: module._conv_forward(x, w, None),  # type: ignore[operator]
            channel=1,
            groups=module.groups,
            windows=Windows.of_module(module),
            **common,
        )
    return None


def _transposed_call(module: Any) -> Call:
    function = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[module.weight.dim()]

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return function(x, weight, None, module.stride, module.padding, module.output_padding, module.groups, module.dilation)

    return call


def _of_call(gm: fx.GraphModule, site: Site, node: fx.Node, channel: int) -> Consumer | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight, bias = given.get("weight"), given.get("bias")
    if not isinstance(weight, fx.Node) or not _is_stored(weight):
        return None
    options = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
    if any(isinstance(n, fx.Node) for n in options.values()):
        return None
    target: Any = node.target
    kernel = tuple(_value(gm, weight).shape[2:])
    return Consumer(
        site,
        node.name,
        lambda x, w: target(x, w, None, **options),
        lambda gm: _value(gm, weight),
        _parameter(gm, weight),
        _parameter(gm, bias),
        channel,
        groups if isinstance(groups := options.get("groups", 1), int) else 1,
        windows=Windows.of_call(kernel, options) if channel == 1 else None,
    )


def _of_product(gm: fx.GraphModule, site: Site, node: fx.Node) -> Consumer | None:
    """``x @ weight``, and ``addmm(bias, x, weight)`` as GPT-2 has it."""
    added = node.target is torch.addmm
    other = node.args[1 + added] if len(node.args) == 2 + added and not node.kwargs else None
    if not isinstance(other, fx.Node) or not _is_stored(other) or _value(gm, other).dim() != 2:
        return None
    weight, bias = _parameter(gm, other), _parameter(gm, node.args[0]) if added else None
    return Consumer(site, node.name, lambda x, w: x @ w, lambda gm: _value(gm, other), weight, bias, -1, across=True)


def _parameter(gm: fx.GraphModule, node: Any) -> str | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return str(node.target) if isinstance(fetch(gm, str(node.target)), nn.Parameter) else None


def _is_stored(node: fx.Node) -> bool:
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (bool(inputs) and all(_is_stored(n) for n in inputs))


def _value(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The value of a weight that the graph computes from stored tensors."""
    return run_node(node, lambda n: _value(gm, n), gm)
