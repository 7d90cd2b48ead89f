"""What a layer should give, in the sum that its output goes into: the way from the one to the other, and back."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import fx

from stp_fx.rewrite.side_by_side import Network

__all__ = ["Change", "Lacking", "Path", "ResidualPath", "needed", "origin", "pulled_back", "residual_path"]

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

    ``nodes``: what has to be run for ``last``, in order.
    """

    total: str
    last: str
    other: str
    nodes: tuple[str, ...]


def residual_path(network: Network, layer: str, layers: Set[str]) -> ResidualPath | None:
    """The way from a layer to the sum that it alone feeds, if no other of ``layers`` lies on it; by structure only:
    :func:`pulled_back` says whether it can be gone back."""
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
                return ResidualPath(user.name, current.name, others[0].name, nodes)
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
    which of its numbers the path has a use (bool); the others' change is zero.

    Paths that move numbers and scale them (dropout in evaluation, a norm with running statistics, layer scale, views, windows)
    can be gone back: their transposed Jacobian, which autograd gives, times the path itself is diagonal. Whether that is so
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
