"""Latency of a plan, predicted from measurements on this machine without carrying the plan out."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import cost_of
from stp_fx.analysis.graph import ChannelGraph, alive_classes, kept_positions
from stp_fx.ir.provenance import provenance_of
from stp_fx.measure.latency import take_turns, whole_seconds
from stp_fx.passes.planning import plan_for, prunable_groups
from stp_fx.passes.remove import RemoveChannels
from stp_fx.rules import TensorDims
from stp_fx.selection import carriers

__all__ = ["LatencyModel", "latency_model"]

_CACHE = "latency_model"
_KEPT = (1.0, 0.5, 0.25)
"""Fractions of every group at which nodes are timed."""
_ROUNDS = 7


@dataclasses.dataclass(frozen=True, eq=False)
class LatencyModel:
    """Seconds of every node at a few sizes: ``sizes[node]`` (fractions of its work, rising) and ``seconds[node]``."""

    sizes: Mapping[str, np.ndarray]
    seconds: Mapping[str, np.ndarray]

    def predict(self, graph: ChannelGraph, alive: np.ndarray) -> float:
        """Seconds of one call, when only the flagged classes are alive (bool, one per class).

        Each node's time is interpolated between its measurements, over the fraction of its MACs that is left (of its
        output's elements, for nodes without).
        """
        left = work_left(graph, alive)
        return float(sum(np.interp(left.get(name, 1.0), xs, self.seconds[name]) for name, xs in self.sizes.items()))


def latency_model(gm: fx.GraphModule, *, clock: Callable[[], float] = time.perf_counter) -> LatencyModel:
    """Times the graph node by node on its recorded example shapes, as it is and pruned uniformly to a half and a quarter.

    The three take turns, in eval mode on the graph's device; medians. Nodes share the time of a whole call: timed one by one
    they take longer, by a constant each, which would look like work that no plan can save. Measured once for a graph: later
    calls return the same model. A node's time is made monotone in its size, so that a plan that removes more is never
    predicted slower. It is a model: an op that runs fast on some sizes only is seen at the sizes that were timed.
    """
    cache = provenance_of(gm).cache
    graph = analyze(gm)
    if _CACHE not in cache or cache[_CACHE][0] is not graph:
        cache[_CACHE] = (graph, _measured(gm, graph, clock))
    return cache[_CACHE][1]


def work_left(graph: ChannelGraph, alive: np.ndarray) -> dict[str, float]:
    """The fraction of each node's MACs that a plan leaves; of its output's elements, for a node without MACs."""
    whole, left = (cost_of(graph, [], each).per_node for each in (np.ones_like(alive), alive))
    result = {name: left[name] / macs for name, macs in whole.items() if macs}
    known: dict[tuple[int, ...], float] = {}
    for name, value in graph.found.values.items():
        if name in result or not isinstance(value, TensorDims):
            continue
        fraction = 1.0
        for dim in value.dims:
            key = tuple(id(f.ids) if f.ids is not None else -f.size for f in dim)
            if key not in known:
                known[key] = float(kept_positions(dim, alive, graph.solution.label).mean())
            fraction *= known[key]
        result[name] = fraction
    return result


def _measured(gm: fx.GraphModule, graph: ChannelGraph, clock: Callable[[], float]) -> LatencyModel:
    graphs, left = [], []
    for kept in _KEPT:
        removed = _first_units(gm, graph, kept)
        graphs.append(gm if kept == 1.0 else RemoveChannels(plan_for(graph, removed))(gm).graph_module)
        left.append(work_left(graph, alive_classes(graph, removed)))
    taken = [
        {name: seconds * whole / sum(nodes.values()) for name, seconds in nodes.items()}
        for nodes, whole in zip(take_turns(graphs, _ROUNDS, clock), whole_seconds(graphs, _ROUNDS, clock), strict=True)
    ]
    sizes, seconds = {}, {}
    for name in taken[0]:
        points = sorted((each.get(name, 1.0), times[name]) for each, times in zip(left, taken, strict=True) if name in times)
        merged = {size: statistics.median(t for s, t in points if s == size) for size, _ in points}
        sizes[name] = np.array(list(merged))
        seconds[name] = np.maximum.accumulate(np.array(list(merged.values())))
    return LatencyModel(sizes, seconds)


def _first_units(gm: fx.GraphModule, graph: ChannelGraph, kept: float) -> np.ndarray:
    removed = np.zeros(graph.units, dtype=bool)
    groups = prunable_groups(gm, graph, ())
    carrying = carriers(groups, graph.products)
    for group in groups:
        if group.index in carrying:
            removed[group.units[max(1, round(kept * group.size)) :]] = True
    return removed
