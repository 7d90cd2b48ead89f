"""Multiply-accumulates and parameters of a graph, or of any plan for it, from the same rule table. Nothing is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.liveness import alive_under
from stp_fx.ir.provenance import provenance_of
from stp_fx.rules import FIXED, Dim

__all__ = ["Cost", "cost", "cost_of", "parameter_names"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """``macs``: multiply-accumulates of all contractions (conv, linear, matmul, attention) for the recorded example;
    ``params``: parameter elements, tied ones once; ``per_node``: MACs by graph node."""

    macs: int
    params: int
    per_node: Mapping[str, int] = dataclasses.field(repr=False)


def cost(gm: fx.GraphModule) -> Cost:
    """The cost of a captured graph; a masked graph counts what is alive.

    Raises:
        InputError: ``gm`` carries no recorded example inputs.
    """
    graph = analyze(gm)
    masked = provenance_of(gm).masked
    alive = np.ones(graph.solution.count, dtype=bool) if masked is None else alive_under(graph, masked, partial=True)
    return cost_of(graph, parameter_names(gm), alive)


def parameter_names(gm: fx.GraphModule) -> list[str]:
    """Parameters, tied ones under their first name."""
    return [name for name, _ in gm.named_parameters()]


def cost_of(graph: ChannelGraph, parameters: list[str], alive: np.ndarray) -> Cost:
    """What the graph costs when only the flagged classes are alive (bool, one per class)."""
    living = alive[graph.solution.label]
    living[FIXED] = True
    sizes: dict[int, int] = {}
    per_node: dict[str, int] = {}
    for entry in graph.contractions:
        if entry.multiplier:
            macs = entry.multiplier
            for dim in entry.letters:
                macs *= _alive_size(dim, living, sizes)
            per_node[entry.node] = per_node.get(entry.node, 0) + macs
    return Cost(sum(per_node.values()), count_parameters(graph, parameters, living), per_node)


def count_parameters(graph: ChannelGraph, parameters: list[str], living: np.ndarray) -> int:
    """Elements of all named parameters once only the living positions are left."""
    kept: dict[str, dict[int, int]] = {}
    for axis in graph.found.axes:
        kept.setdefault(axis.tensor, {})[axis.dim] = int(living[axis.ids].sum())
    total = 0
    for name in parameters:
        sizes = list(graph.found.shapes[name])
        for dim, size in kept.get(graph.found.aliases.get(name, name), {}).items():
            sizes[dim] = size
        total += int(np.prod(sizes, dtype=np.int64))
    return total


def _alive_size(dim: Dim, living: np.ndarray, sizes: dict[int, int]) -> int:
    total = 1
    for factor in dim:
        if factor.ids is None:
            total *= factor.size
            continue
        key = id(factor.ids)
        if key not in sizes:
            sizes[key] = int(living[factor.ids].sum())
        total *= sizes[key]
    return total
