"""The closed form from a MAC target to a keep ratio (report, section 2.2), beside the exact search by costed plans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import cost
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.names import prunable_groups
from stp_fx.checks import is_number, shown
from stp_fx.errors import InputError
from stp_fx.rules import Dim
from stp_fx.selection.products import carriers

__all__ = ["MacShares", "estimate_keep_ratio", "mac_shares"]


@dataclasses.dataclass(frozen=True)
class MacShares:
    """MACs by how many of their channel axes are pruned: none (``fixed``, the report's U), one (S1), two or more (S2)."""

    fixed: int
    linear: int
    quadratic: int

    @property
    def total(self) -> int:
        return self.fixed + self.linear + self.quadratic


def mac_shares(gm: fx.GraphModule, *, ignore: Iterable[Any] = (), products: str = "auto") -> MacShares:
    """Classifies the MACs of every contraction; arguments as in :func:`stp_fx.prune_graph`.

    Raises:
        NothingToPruneError: no channel may be removed.
        InputError: a name that matches nothing.
    """
    graph = analyze(gm)
    groups = [group for group in prunable_groups(gm, graph, ignore) if not group.chosen]
    carrying = carriers(groups, graph.products, products)
    pruned = np.zeros(graph.units, dtype=bool)
    for group in groups:
        pruned[group.units] = group.index in carrying
    macs = [0, 0, 0]
    for entry in graph.contractions:
        if entry.multiplier:
            degree = sum(_is_pruned(graph, dim, pruned) for dim in entry.letters)
            size = math.prod(factor.size for dim in entry.letters for factor in dim)
            macs[min(degree, 2)] += entry.multiplier * size
    return MacShares(*macs)


def _is_pruned(graph: ChannelGraph, dim: Dim, pruned: np.ndarray) -> bool:
    return bool(pruned[graph.units_along(dim)[1]].any())


def estimate_keep_ratio(gm: fx.GraphModule, mac_target: float, *, ignore: Iterable[Any] = (), products: str = "auto") -> float:
    """The fraction q of channels to keep everywhere so that about ``mac_target`` of the MACs are kept, in (0, 1].

    Solves ``mac_target = (U + S1 q + S2 q^2) / T``: linear where only one axis of every layer is pruned (the MLPs of a
    vision transformer), quadratic where inputs and outputs are. An estimate: it knows of no rounding, no axis that is
    pruned in part, and no third axis. ``prune_graph(target="macs")`` is exact; this is for planning by hand.

    Raises:
        InputError: a target outside (0, 1], or below what pruning every channel away would leave.
    """
    if not is_number(mac_target) or not 0 < mac_target <= 1:
        raise InputError(f"mac_target is the fraction of MACs to keep, in (0, 1]; got {shown(mac_target)}")
    shares = mac_shares(gm, ignore=ignore, products=products)
    constant = shares.fixed - mac_target * cost(gm).macs
    if constant >= 0:
        raise InputError(
            f"mac_target {mac_target} is out of reach: {shares.fixed / shares.total:.4f} of the MACs are where nothing is pruned"
        )
    if shares.quadratic == 0:
        return min(-constant / shares.linear, 1.0)
    root = math.sqrt(shares.linear**2 - 4 * shares.quadratic * constant)
    return min((root - shares.linear) / (2 * shares.quadratic), 1.0)
