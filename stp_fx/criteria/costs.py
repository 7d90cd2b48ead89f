"""The savings of removing a unit, as replaceable objects for :class:`~stp_fx.criteria.CostAware`; report, section 1.3.4."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import parameter_names
from stp_fx.analysis.groups import Group
from stp_fx.analysis.unit_costs import activation_elements, contraction_macs, group_costs, parameter_elements
from stp_fx.checks import check_whole, is_a, is_number, shown
from stp_fx.criteria.base import ScoreContext, part
from stp_fx.errors import CriterionError, InputError
from stp_fx.measure.latency import latency_work, node_seconds

__all__ = ["PER", "ActivationBytes", "CostModel", "Latency", "Macs", "Params", "Table"]

PER = ("unit", "layer")


class CostModel(Protocol):
    """The cost of one unit of each group: float64 by group index, at least 0.

    ``per`` "unit": the saving when one unit alone is removed. "layer": the cost of everything that the unit is part of, which is
    the report's ``cost_m``. Write a frozen dataclass with this ``__call__`` for any other cost.
    """

    def __call__(self, context: ScoreContext, per: str, /) -> np.ndarray: ...


@part
@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of all contractions, for the recorded example; exact."""

    def __call__(self, context: ScoreContext, per: str) -> np.ndarray:
        graph = analyze(context.graph_module())
        return group_costs(graph, contraction_macs(graph), per)


@part
@dataclasses.dataclass(frozen=True)
class Params:
    """Parameter elements, tied ones once; exact."""

    def __call__(self, context: ScoreContext, per: str) -> np.ndarray:
        gm = context.graph_module()
        graph = analyze(gm)
        return group_costs(graph, parameter_elements(graph, parameter_names(gm)), per)


@part
@dataclasses.dataclass(frozen=True)
class ActivationBytes:
    """Bytes of the tensors that the graph's nodes give for the recorded example, in the dtype of the model's parameters.

    Every node counts once, a view as if it were a copy: traffic of an eager run rather than its peak memory.
    """

    def __call__(self, context: ScoreContext, per: str) -> np.ndarray:
        gm = context.graph_module()
        graph = analyze(gm)
        size = next((p.element_size() for p in gm.parameters() if p.is_floating_point()), 4)
        nodes = [n.name for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        return size * group_costs(graph, activation_elements(graph, nodes), per)


@part
@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds, measured node by node on the machine and device at hand, in ``runs`` runs of the recorded example.

    A unit is charged the fraction of a node's seconds that it has of its MACs (of its output's elements where it has
    none). Measured once for a call of :func:`stp_fx.criteria.score`; two measurements differ, so scores of close units may swap.
    """

    runs: int = 5

    def __post_init__(self) -> None:
        check_whole("runs", self.runs, 1)

    def __call__(self, context: ScoreContext, per: str) -> np.ndarray:
        gm = context.graph_module()
        graph = analyze(gm)
        return group_costs(graph, latency_work(graph, node_seconds(gm, self.runs)), per)


@part
@dataclasses.dataclass(frozen=True)
class Table:
    """The user's own numbers: power, bandwidth, a vendor's figures.

    ``costs`` maps names to the cost of one unit, for either ``per``: a group's name, or that of a weight or module. A
    group that is not named itself costs the sum over the named layers whose outputs its units are.

    Raises :class:`CriterionError` for a group that neither way gives a cost.
    """

    costs: Mapping[str, float]

    def __post_init__(self) -> None:
        if not is_a(self.costs, Mapping):
            raise InputError(f"`costs` maps groups or layers to the cost of one unit; got {shown(self.costs)}")
        for name, value in self.costs.items():
            if not is_number(value) or not 0 <= value < math.inf:
                raise InputError(f"the cost of {shown(name)} is {shown(value)}; a cost is a finite number of at least 0")

    def __call__(self, context: ScoreContext, per: str) -> np.ndarray:
        groups = analyze(context.graph_module()).groups
        scored = {group.index for group in context.groups or groups}
        return np.array([self._of(group) if group.index in scored else 0.0 for group in groups])

    def _of(self, group: Group) -> float:
        if group.name in self.costs:
            return float(self.costs[group.name])
        layers = {m.axis.tensor for m in group.members if m.axis.role == "weight" and m.axis.side != "in"}
        found = [name for name in self.costs if any(t == name or t.startswith(f"{name}.") for t in layers)]
        if not found:
            raise CriterionError(
                f"the table of costs names neither group {group.name!r} nor a layer that gives its units "
                f"({', '.join(sorted(layers)) or 'it has none'}); add one, or put the group in `ignore`"
            )
        return float(sum(self.costs[name] for name in found))
