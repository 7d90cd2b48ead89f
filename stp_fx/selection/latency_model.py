"""Latency of a plan, predicted from measurements on this machine without carrying the plan out."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.names import prunable_groups
from stp_fx.analysis.survivors import Survivors
from stp_fx.measure.latency import take_turns, whole_seconds
from stp_fx.rewrite.removal import remove
from stp_fx.selection.products import carriers

__all__ = ["LatencyModel", "latency_model"]

_KEPT = (1.0, 0.5, 0.25)
"""Fractions of every group at which nodes are timed."""
_ROUNDS = 7


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LatencyModel:
    """Seconds of every node at a few sizes: ``sizes[node]`` (fractions of its work, rising) and ``seconds[node]``."""

    sizes: Mapping[str, np.ndarray]
    seconds: Mapping[str, np.ndarray]

    def __repr__(self) -> str:
        whole = sum(float(seconds[-1]) for seconds in self.seconds.values())
        return f"LatencyModel({len(self.seconds)} nodes, {whole:.3g} s a call)"

    def predict(self, survivors: Survivors) -> float:
        """Seconds of one call of the graph with only the survivors.

        Each node's time is interpolated between its measurements, over the fraction of its MACs that is left (of its
        output's elements, for nodes without).
        """
        left = survivors.work_left()
        return float(sum(np.interp(left.get(name, 1.0), xs, self.seconds[name]) for name, xs in self.sizes.items()))


def latency_model(gm: fx.GraphModule, *, clock: Callable[[], float] = time.perf_counter) -> LatencyModel:
    """Times the graph node by node on its recorded example shapes, as it is and pruned uniformly to a half and a quarter.

    The three take turns, in eval mode on the graph's device; medians. Nodes share the time of a whole call: timed one by one
    they take longer, by a constant each, which would look like work that no plan can save. Every call measures
    again. A node's time is made monotone in its size, so that a plan that removes more is never
    predicted slower. It is a model: an op that runs fast on some sizes only is seen at the sizes that were timed.
    """
    return _measured(gm, analyze(gm), clock)


def _measured(gm: fx.GraphModule, graph: ChannelGraph, clock: Callable[[], float]) -> LatencyModel:
    graphs, left = [], []
    for kept in _KEPT:
        removed = _first_units(gm, graph, kept)
        graphs.append(gm if kept == 1.0 else remove(gm, graph.plan_removing(removed)))
        left.append(graph.survivors_without(removed).work_left())
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
