"""Activation inputs (``Site``): values that contractions read along an axis they sum over. A unit's signal is measured there.

An activation input lies after the activation function, the norm or the depthwise convolution between producer and consumer,
wherever these are in the graph. The contraction that reads the value decides, no table of architectures (report, sections
1.3.3 and 2.4.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.analysis.norm_calls import norm_calls
from stp_fx.analysis.solved import Solved
from stp_fx.ir.memo import Same, remembered
from stp_fx.rules import TensorDims, dim_size

__all__ = ["Site", "SiteMember", "Sites", "find_sites"]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Dimension ``dim`` of the value of node ``source``, as node ``reader`` sums over it.

    ``shape`` is the value's shape for the recorded example. ``index`` and ``unit`` (int64, of one length, sorted by index)
    say which positions belong to which unit of the graph; positions that cannot go have no entry, those of a product one
    for each factor. ``weights`` names the parameters whose input axis is read with it; empty where two activations meet
    (query and key).
    """

    reader: str
    source: str
    dim: int
    shape: tuple[int, ...]
    index: np.ndarray
    unit: np.ndarray
    weights: tuple[str, ...]

    @property
    def size(self) -> int:
        return self.shape[self.dim]

    @property
    def name(self) -> str:
        return f"{self.source}:{self.dim} read by {self.reader}"


@dataclasses.dataclass(frozen=True, eq=False)
class SiteMember:
    """An activation input as one group touches it: position ``index[k]`` belongs to unit ``unit[k]`` of the group."""

    site: Site
    index: np.ndarray
    unit: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Sites:
    """All activation inputs of a graph, in graph order, and those where each group is read."""

    all: tuple[Site, ...]
    by_group: Mapping[int, tuple[SiteMember, ...]] = dataclasses.field(repr=False)

    def of(self, group: Group) -> tuple[SiteMember, ...]:
        """Where the units of ``group`` are read; empty if no contraction sums over them."""
        return self.by_group.get(group.index, ())


def find_sites(gm: fx.GraphModule) -> Sites:
    """The activation inputs of a captured graph; computed once for a graph.

    Raises:
        InputError: ``gm`` carries no recorded example inputs.
    """
    graph = analyze(gm)

    def found() -> Sites:
        sites = tuple(_sites(gm, graph))
        return Sites(sites, _by_group(graph, sites))

    return remembered(gm, "sites", Same(graph), found)


def _sites(gm: fx.GraphModule, graph: ChannelGraph) -> Iterator[Site]:
    solved = graph._solved
    weights = _weight_inputs(solved)
    stored: set[fx.Node] = set()
    norms = {norm.node for norm in norm_calls(gm)}  # they sum squares, and no weight reads them
    summed = np.zeros(graph.units, dtype=bool)
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and node.op != "output" and all(n in stored for n in inputs)):
            stored.add(node)
        if node.name not in solved.contracted or node in norms:
            continue
        _, units = solved.touched.of(solved.label[solved.contracted[node.name]])
        summed[units] = True
        names = tuple(_weights_read(node, summed, weights))
        for source in inputs:
            if source not in stored:
                yield from _site_dims(graph, node, source, summed, names)
        summed[units] = False


def _site_dims(graph: ChannelGraph, node: fx.Node, source: fx.Node, summed: np.ndarray, names: tuple[str, ...]) -> Iterator[Site]:
    value = graph.value(source.name)
    if not isinstance(value, TensorDims):
        return
    shape = tuple(dim_size(dim) for dim in value.dims)
    for k, dim in enumerate(value.dims):
        index, unit = graph.units_along(dim)
        read = summed[unit]
        if read.any():
            index, unit = index[read], unit[read]
            yield Site(node.name, source.name, k, shape, index, unit, names)


def _weight_inputs(solved: Solved) -> dict[str, np.ndarray]:
    """Parameter to the units on its input axes."""
    found: dict[str, list[np.ndarray]] = {}
    for axis in solved.found.axes:
        if axis.role == "weight" and axis.side in ("in", "both"):
            found.setdefault(axis.tensor, []).append(solved.touched.of(solved.label[axis.ids])[1])
    return {name: np.concatenate(units) for name, units in found.items()}


def _weights_read(node: fx.Node, summed: np.ndarray, weights: Mapping[str, np.ndarray]) -> Iterator[str]:
    if node.op == "call_module":
        prefix = f"{node.target}."
        names = [name for name in weights if name.startswith(prefix) and "." not in name[len(prefix) :]]
    else:
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    for name in names:
        if name in weights and summed[weights[name]].any():
            yield name


def _by_group(graph: ChannelGraph, sites: tuple[Site, ...]) -> dict[int, tuple[SiteMember, ...]]:
    owner = np.empty(graph.units, dtype=np.int64)
    local = np.empty(graph.units, dtype=np.int64)
    for group in graph.groups:
        owner[group.units], local[group.units] = group.index, np.arange(group.size)
    found: dict[int, list[SiteMember]] = {}
    for site in sites:
        owners = owner[site.unit]
        for group in np.unique(owners).tolist():
            mine = owners == group
            found.setdefault(group, []).append(SiteMember(site, site.index[mine], local[site.unit[mine]]))
    return {group: tuple(members) for group, members in found.items()}
