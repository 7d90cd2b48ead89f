"""Norm calls: where a graph normalises over its last dimension, however the call is spelled."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from stp_fx.ir.shapes import fetch
from stp_fx.rules.edit import Signature

__all__ = ["NormCall", "norm_calls"]

_LAYER = Signature.of("input normalized_shape weight bias eps")
_RMS = Signature.of("input normalized_shape weight eps")
_FUNCTIONS = {
    F.layer_norm: ("layer", _LAYER),
    torch.layer_norm: ("layer", _LAYER),
    F.rms_norm: ("rms", _RMS),
    torch.rms_norm: ("rms", _RMS),
}


@dataclasses.dataclass(frozen=True, eq=False)
class NormCall:
    """A LayerNorm ("layer") or RMSNorm ("rms") over the last dimension.

    ``weight`` and ``bias`` name parameters; ``computed`` says that either is a value that the graph computes. ``eps`` None is
    torch's default for RMSNorm: the smallest step of the input's dtype. ``hooked``: the module has hooks, which see its values.
    """

    node: fx.Node
    kind: str
    value: fx.Node
    weight: str | None
    bias: str | None
    eps: float | None
    computed: bool = False
    hooked: bool = False


def norm_calls(gm: fx.GraphModule) -> list[NormCall]:
    """All of them, in graph order; norms over several dimensions are left out."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            made = _of_module(node, fetch(gm, str(node.target)))
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            made = _of_function(node, *_FUNCTIONS[node.target])
        else:
            continue
        if made is not None:
            found.append(made)
    return found


def _of_module(node: fx.Node, module: nn.Module) -> NormCall | None:
    kinds = {nn.LayerNorm.forward: "layer", nn.RMSNorm.forward: "rms"}
    kind = kinds.get(type(module).forward)
    if kind is None or len(module.normalized_shape) != 1:  # type: ignore[arg-type]
        return None
    names = {
        each: f"{node.target}.{each}" if isinstance(module._parameters.get(each), nn.Parameter) else None
        for each in ("weight", "bias")
    }
    value = node.all_input_nodes[0]
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return NormCall(node, kind, value, names["weight"], names["bias"], module.eps, hooked=hooked)  # type: ignore[arg-type]


def _of_function(node: fx.Node, kind: str, signature: Signature) -> NormCall | None:
    where = signature.bind(node.args, node.kwargs)
    given = {name: node.args[at] if isinstance(at, int) else node.kwargs[at] for name, at in where.items()}
    shape: Any = given.get("normalized_shape")
    if not isinstance(shape, (list, tuple)) or len(shape) != 1 or not isinstance(given.get("input"), fx.Node):
        return None
    tensors = {name: given.get(name) for name in ("weight", "bias")}
    names = {name: str(n.target) if isinstance(n, fx.Node) and n.op == "get_attr" else None for name, n in tensors.items()}
    computed = any(isinstance(n, fx.Node) and n.op != "get_attr" for n in tensors.values())
    eps: Any = given.get("eps", 1e-5 if kind == "layer" else None)
    if isinstance(eps, fx.Node):
        return None
    return NormCall(node, kind, given["input"], names["weight"], names["bias"], eps, computed)  # type: ignore[arg-type]
