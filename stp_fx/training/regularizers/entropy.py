"""The entropy of channels' variances, measured where statistics are (report, section 1.4.3)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.autograd.function import once_differentiable

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.analysis.sites import find_sites
from stp_fx.errors import InputError
from stp_fx.training.regularizers.base import BaseRegularizer, Groups, check_number, register
from stp_fx.training.regularizers.sums import cached, unmasked

__all__ = ["VarianceEntropy"]

_PREFIX = "stp_fx_observer"


class _Variance(torch.autograd.Function):
    """Population variance along ``dim``, in two plain passes: on a CPU, forward, they take a ninth of ``torch.var``'s time
    (8 x 256 x 56 x 56, one thread). One function of its own, so that autograd keeps no centred copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
        others = [k for k in range(x.dim()) if k != dim]
        mean = x.mean(others, keepdim=True)
        ctx.save_for_backward(x, mean)
        ctx.others = others
        return (x - mean).square_().mean(others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, mean = ctx.saved_tensors
        factor = grads[0] * (2 * mean.numel() / x.numel())
        return (x - mean).mul_(factor.reshape(mean.shape)), None


def _variance(x: torch.Tensor, dim: int) -> torch.Tensor:
    return _Variance.apply(x, dim)  # type: ignore[return-value]


class _Observer(nn.Module):
    """Passes a value on, and keeps the variance of its channels while the model trains. It has no state of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.variance: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.variance = None
        if self.training and torch.is_grad_enabled() and x.requires_grad and not x.is_meta:
            wide = x if x.dtype == torch.float64 else x.float()
            self.variance = _variance(wide, self.dim) if x.dim() > 1 else None
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> _Observer:
        copied = _Observer(self.dim)
        copied.train(self.training)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "variance": None}


@register("variance_entropy")
@dataclasses.dataclass(frozen=True)
class VarianceEntropy(BaseRegularizer):
    """``strength`` times the sum over inputs of ``H = -sum p log p``, with ``p = variance / sum of variances`` over the channels
    that are not masked there; population variances over batch and positions of the last training forward. Small entropy: few
    channels carry the signal, those of large variance.

    :meth:`attach` puts observers into the graph, which change no output and no state dict; :meth:`detach` removes them.
    A manager does both.
    """

    strength: float = 1e-3
    forms: ClassVar[tuple[str, ...]] = ("loss",)

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0.0)

    def attach(self, gm: fx.GraphModule) -> None:
        """Puts observers where units that may be removed are read; does nothing if there are some already."""
        if _observers(gm):
            return
        places = dict.fromkeys((site.source, site.dim) for site in find_sites(gm).all if len(site.index))
        nodes = {node.name: node for node in gm.graph.nodes}
        for number, (source, dim) in enumerate(places):
            name, node = f"{_PREFIX}_{number}", nodes[source]
            observer = _Observer(dim)
            observer.train(gm.training)
            gm.add_module(name, observer)
            with gm.graph.inserting_after(node):
                seen = gm.graph.call_module(name, (node,))
            node.replace_all_uses_with(seen, delete_user_cb=lambda user, seen=seen: user is not seen)
        gm.recompile()

    def detach(self, gm: fx.GraphModule) -> None:
        """The graph without observers."""
        for node in list(gm.graph.nodes):
            if node.op == "call_module" and str(node.target).startswith(_PREFIX):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
                delattr(gm, str(node.target))
        gm.recompile()

    def loss(self, gm: fx.GraphModule, groups: Groups = None) -> torch.Tensor:
        """Uses the activations of the last forward, and forgets them."""
        channels = cached(gm, groups, type(self), lambda graph, chosen: _channels(gm, graph, chosen))
        seen = {}
        for name, observer in _observers(gm).items():  # all of them: one that is left would keep the graph of this forward
            seen[name], observer.variance = observer.variance, None
        terms = [_entropy(seen[name][index]) for name, index in channels.items() if seen[name] is not None]
        if not terms:
            raise InputError(
                "no variance was observed: call attach(gm) once, and loss(gm) after every forward in train mode "
                "with gradients enabled"
            )
        return float(self.strength) * torch.stack(terms).sum()


def _observers(gm: fx.GraphModule) -> dict[str, _Observer]:
    return {name: module for name, module in gm.named_children() if isinstance(module, _Observer)}


def _channels(gm: fx.GraphModule, graph: ChannelGraph, groups: tuple[Group, ...]) -> dict[str, torch.Tensor]:
    """By observer: the positions of unmasked channels (int64), where any of ``groups`` is read."""
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))
    units = {int(unit) for group in groups for unit in group.units}
    alive = unmasked(gm, graph)
    nodes = {node.name: node for node in gm.graph.nodes}
    found = {}
    for site in find_sites(gm).all:
        name = _observer_of(gm, nodes[site.source], site.dim)
        if name is None or not units.intersection(site.unit.tolist()):
            continue
        keep = torch.ones(site.size, dtype=torch.bool)
        keep[torch.from_numpy(site.index[~alive[site.unit]])] = False
        found[name] = keep.nonzero().flatten().to(device)
    return found


def _observer_of(gm: fx.GraphModule, node: fx.Node, dim: int) -> str | None:
    """The name of the observer of dimension ``dim`` of a value: below masks, and below observers of its other dimensions."""
    while True:
        observer = node.op == "call_module" and str(node.target).startswith(_PREFIX)
        if observer and getattr(gm, str(node.target)).dim == dim:
            return str(node.target)
        masked = node.op == "call_method" and node.target == "masked_fill"
        if not (observer or masked) or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]


def _entropy(variance: torch.Tensor) -> torch.Tensor:
    positive = variance[variance > 0]  # of the others p log p is 0, and its slope is not finite
    p = positive / positive.sum()
    return -(p * p.log()).sum()
