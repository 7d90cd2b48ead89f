"""The desired output of a layer, from the sum that its output enters: the path from the one to the other, and back."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import fx

from stp_fx.rewrite.side_by_side import Network

__all__ = ["Change", "InPlace", "Lacking", "Path", "ResidualPath", "in_place", "needed", "origin", "pulled_back", "residual_path"]

Path = Callable[[torch.Tensor], Any]
Lacking = Callable[[torch.Tensor], "torch.Tensor | None"]
Change = tuple[torch.Tensor, torch.Tensor]

_SUMS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_LONGEST = 16
"""Nodes between a layer and the sum that it goes into."""
_WEAKEST = 1e-3
"""Channels that a norm or a layer scale makes so much smaller than the strongest cannot mend the sum."""


@dataclasses.dataclass(frozen=True)
class ResidualPath:
    """From a layer to the sum ``total`` of what the path gives (``last``) and of an ``other`` value, known before the layer.

    ``nodes``: what has to be run for ``last``, in order. ``alone``: they read nothing but the layer's output and stored tensors.
    """

    total: str
    last: str
    other: str
    nodes: tuple[str, ...]
    alone: bool


def residual_path(network: Network, layer: str, layers: Set[str]) -> ResidualPath | None:
    """The way from a layer to the sum that it alone feeds, if no other of ``layers`` lies on it; by structure only:
    :func:`pulled_back` says whether it can be followed back."""
    start = network.at[layer]
    current = network.by_name[layer]
    for _ in range(_LONGEST):
        users = [user for user in current.users if user not in network.left_out]
        if len(users) != 1 or users[0].name in layers or users[0].op == "output":
            return None
        user = users[0]
        if user.target in _SUMS and len(user.args) == 2 and not user.kwargs:
            others = [n for n in user.args if isinstance(n, fx.Node) and n is not current]
            if len(others) == 1 and others[0].op != "get_attr":
                known = network.at[others[0].name] < start
                nodes = needed(network, current, start) if known else None
                if nodes is None or layers & set(nodes):
                    return None
                own = {layer, *nodes}
                read = {n for name in nodes for n in network.by_name[name].all_input_nodes if n.name not in own}
                return ResidualPath(user.name, current.name, others[0].name, nodes, all(n.op == "get_attr" for n in read))
        current = user
    return None


def origin(value: fx.Node, layers: Set[str]) -> str | None:
    """The layer whose output ``value`` is, moved or picked from: the first operands are followed back."""
    for _ in range(_LONGEST):
        if value.name in layers:
            return value.name
        before = next((n for n in value.args if isinstance(n, fx.Node)), None)
        if before is None or before.op in ("placeholder", "get_attr"):
            return None
        value = before
    return None


def needed(network: Network, last: fx.Node, start: int) -> tuple[str, ...] | None:
    """The nodes after place ``start`` that ``last`` depends on, itself included; None if there are many."""
    found: set[fx.Node] = set()
    waiting = [last] if network.at[last.name] > start else []
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting += [n for n in node.all_input_nodes if network.at[n.name] > start]
    names = sorted((node.name for node in found), key=network.at.__getitem__)
    return tuple(names) if len(names) <= 4 * _LONGEST else None


def pulled_back(path: Path, output: torch.Tensor, lacking: Lacking, *, known: bool = False) -> Change | None:
    """By how much ``output`` has to change for what ``path`` makes of it to change by what is ``lacking(path(output))``, and for
    which of its numbers the path uses (bool); the others' change is zero.

    Paths that move numbers and scale them (dropout in evaluation, a norm with running statistics, layer scale, views, windows)
    can be followed back: their transposed Jacobian, which autograd gives, times the path itself is diagonal. Whether that is so
    is tried on random numbers, unless it is ``known``. None where it is not, or where the shapes do not fit.
    """
    with torch.enable_grad():
        start = output.detach().clone().requires_grad_()
        try:
            end = path(start * 1)
        except RuntimeError:
            return None
        if not isinstance(end, torch.Tensor) or not end.requires_grad:
            return None
        with torch.no_grad():
            lack = lacking(end.detach())
        if lack is None or lack.shape != end.shape:
            return None

        def back(value: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(end, start, value.to(end.dtype), retain_graph=True)[0]

        square = back(torch.ones_like(end)).square()
        if not known and not _is_diagonal(path, start.detach(), end.detach(), back, square):
            return None
        strong = square > _WEAKEST**2 * square.max()
        return torch.where(strong, back(lack) / torch.where(strong, square, 1.0), 0.0), strong


@dataclasses.dataclass(frozen=True, eq=False)
class InPlace:
    """A path that leaves every number where it is: ``scale * x + constant``, the same for every sample; both are [1, ...].

    Dropout in evaluation, a norm with running statistics, layer scale.
    """

    scale: torch.Tensor
    constant: torch.Tensor
    strong: torch.Tensor

    def start(self, end: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor], shape: torch.Size) -> Change:
        """The start of the path for which it ends at ``end``, and where its scale is strong enough; as ``rows`` of values
        of that ``shape``."""
        scale, constant, strong = (rows(each.expand(shape)) for each in (self.scale, self.constant, self.strong))
        strong = strong > 0
        return torch.where(strong, (end - constant) / torch.where(strong, scale, 1.0), 0.0), strong


def in_place(path: Path, output: torch.Tensor) -> InPlace | None:
    """The path as :class:`InPlace`, from two samples of ``output``; None if it is not, which is tried on random numbers and on
    ``output`` itself. In half precision it cannot be told."""
    if output.dtype not in (torch.float32, torch.float64) or output.dim() < 2 or not output.numel():
        return None
    try:
        with torch.enable_grad():
            start = output[:2].detach().clone().requires_grad_()
            end = path(start * 1)
            if not isinstance(end, torch.Tensor) or end.shape != start.shape or not end.requires_grad:
                return None
            scale = torch.autograd.grad(end, start, torch.ones_like(end))[0][:1]
        constant = path(torch.zeros_like(start))[:1]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(start.shape, generator=generator).to(start) * output.std().clamp_min(1e-6)
        for value in (noise, output):
            difference = path(value.clone()) - torch.addcmul(constant, value, scale)
            if difference.shape != value.shape or not bool(difference.abs().max() <= 1e-3 * (scale * value).abs().max()):
                return None
    except RuntimeError:
        return None
    return InPlace(scale, constant, (scale.abs() > _WEAKEST * scale.abs().max()).to(scale))


def _is_diagonal(
    path: Path,
    start: torch.Tensor,
    end: torch.Tensor,
    back: Callable[[torch.Tensor], torch.Tensor],
    square: torch.Tensor,
) -> bool:
    """Whether the path is affine, and its Jacobian moves and scales numbers without mixing them."""
    generator = torch.Generator().manual_seed(0)
    step = (torch.randn(start.shape, generator=generator) * 2).to(start) * start.std().clamp_min(1e-6)
    with torch.no_grad():
        up, down = path(start + step), path(start - step)
        moved = (up - down) / 2
        bent = (up + down) / 2 - end
        near = 1e-3 if end.dtype in (torch.float32, torch.float64) else 3e-2
        size = moved.square().mean().sqrt()
        if not bool(bent.abs().max() <= near * (size + end.abs().max())):
            return False
    again = back(moved)
    expected = square * step
    return bool((again - expected).abs().max() <= near * 10 * expected.abs().max().clamp_min(1e-30))
