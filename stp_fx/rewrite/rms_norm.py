"""RMSNorm over fewer channels: scale and epsilon that make the removal from its axis what masking is.

With C' of C channels kept and the others zero, ``mean(x^2) = (C'/C) mean'(x^2)``, so ``x / sqrt(mean(x^2) + eps)`` is
``sqrt(C/C') x / sqrt(mean'(x^2) + (C/C') eps)``: the scale takes ``sqrt(C/C')``, epsilon ``C/C'``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.norm_calls import NormCall, norm_calls
from stp_fx.analysis.survivors import Survivors
from stp_fx.ir.shapes import fetch
from stp_fx.rules import TensorDims

__all__ = ["rescale_rms_norms", "rms_scale_factors"]


def rms_scale_factors(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> dict[str, float]:
    """The scales of RMSNorms that the removal multiplies, under all of their names; ``graph`` is the analysis of ``gm``."""
    return {name: factor for name, (factor, _) in _factors(gm, _ratios(gm, graph, survivors)).items()}


def rescale_rms_norms(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> None:
    """Renews scales and epsilons in ``gm``, whose tensors have been shortened, in place.

    ``graph`` is the analysis of the original. An epsilon of None, the smallest step of the dtype, stays: it is rounding. A norm
    without a scale of its own, or with one that others read as well, is multiplied by a number.
    """
    ratios = _ratios(gm, graph, survivors)
    if not ratios:
        return
    factors = _factors(gm, ratios)
    for name, factor in {id(weight): (name, factor) for name, (factor, weight) in factors.items()}.values():
        with torch.no_grad():
            fetch(gm, name).mul_(factor)
    done: set[int] = set()
    for norm, ratio in ratios.items():
        if norm.weight not in factors:
            _multiply(gm, norm.node, math.sqrt(ratio))
        _renew_epsilon(gm, norm, ratio, done)
    gm.recompile()


def _ratios(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> dict[NormCall, float]:
    """The RMSNorms that lose channels of their axis, each with C / C'."""
    found: dict[NormCall, float] = {}
    for norm in norm_calls(gm):
        value = graph.value(norm.value.name)
        if norm.kind == "rms" and not norm.hooked and isinstance(value, TensorDims):
            flags = survivors.flags(value.dims[-1])
            kept = int(flags.sum())
            if 0 < kept < len(flags):
                found[norm] = len(flags) / kept
    return found


def _factors(gm: fx.GraphModule, ratios: Mapping[NormCall, float]) -> dict[str, tuple[float, torch.Tensor]]:
    """Factors of scales that only norms of one ratio read, with the tensors, by all of their names."""
    by_weight: dict[int, list[NormCall]] = {}
    for norm in ratios:
        if norm.weight is not None and not norm.computed:
            by_weight.setdefault(id(fetch(gm, norm.weight)), []).append(norm)
    found: dict[str, tuple[float, torch.Tensor]] = {}
    for norms in by_weight.values():
        tensor = fetch(gm, str(norms[0].weight))
        names = {name for name, each in gm.named_parameters(remove_duplicate=False) if each is tensor}
        if len({ratios[norm] for norm in norms}) == 1 and _are_all(gm, norms, names):
            found.update((name, (math.sqrt(ratios[norms[0]]), tensor)) for name in names)
    return found


def _are_all(gm: fx.GraphModule, norms: Sequence[NormCall], names: set[str]) -> bool:
    """Whether nothing but these norms reads the tensor with these names."""
    nodes = {norm.node for norm in norms}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in names and not set(node.users) <= nodes:
            return False
        if node.op == "call_module" and node not in nodes and any(name.startswith(f"{node.target}.") for name in names):
            return False
    return True


def _multiply(gm: fx.GraphModule, node: fx.Node, factor: float) -> None:
    with gm.graph.inserting_after(node):
        product = gm.graph.call_function(operator.mul, (node, factor))
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


def _renew_epsilon(gm: fx.GraphModule, norm: NormCall, ratio: float, done: set[int]) -> None:
    if norm.eps is None:
        return
    if norm.node.op == "call_module":
        module = fetch(gm, str(norm.node.target))
        assert isinstance(module, nn.RMSNorm)
        if id(module) not in done:
            module.eps = norm.eps * ratio
            done.add(id(module))
    elif len(norm.node.args) > 3:
        norm.node.update_arg(3, norm.eps * ratio)
    else:
        norm.node.update_kwarg("eps", norm.eps * ratio)
