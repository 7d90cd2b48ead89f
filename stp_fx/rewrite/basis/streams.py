"""Streams: sets of channels that are normalised together, and every node and stored tensor that has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.carriers import Carrier, carriers_of_axes, touches, units_of_dim
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.norm_calls import NormCall, norm_calls
from stp_fx.errors import NothingToRotateError
from stp_fx.rewrite.basis.probe import Change, Probe, described, same
from stp_fx.text import listed

__all__ = ["Stream", "Touched", "find_streams", "pinned_streams"]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """``units`` in the order of their channels; ``name`` is that of the first value that is normalised; ``norms`` over it."""

    name: str
    units: np.ndarray
    norms: tuple[NormCall, ...]

    @property
    def size(self) -> int:
        return len(self.units)


def find_streams(gm: fx.GraphModule) -> list[Stream]:
    """The streams of a graph: what its norms normalise over. A norm over several streams beside each other belongs to each."""
    graph = analyze(gm)
    sets: dict[frozenset[int], tuple[str, np.ndarray]] = {}
    over: list[tuple[NormCall, frozenset[int]]] = []
    for norm in norm_calls(gm):
        units = units_of_dim(graph, graph.value(norm.value.name), -1)
        if units is not None:
            key = frozenset(units.tolist())
            sets.setdefault(key, (norm.value.name, units))
            over.append((norm, key))
    atoms = [key for key in sets if not any(other < key for other in sets)]
    return [Stream(*sets[key], tuple(norm for norm, all_of in over if key <= all_of)) for key in atoms]


def pinned_streams(gm: fx.GraphModule) -> dict[str, str]:
    """Values normalised over channels that cannot be removed, which are therefore not rotated: their names, with the reasons."""
    graph = analyze(gm)
    found: dict[str, str] = {}
    for norm in norm_calls(gm):
        if units_of_dim(graph, graph.value(norm.value.name), -1) is None:
            axis = None if norm.weight is None else f"{graph.first_name(norm.weight)}:0"
            reasons = graph.pin_reasons(axis) if axis is not None else []
            found[norm.value.name] = f"they are pinned ({listed(reasons, 2) or 'no unit of one channel'})"
    return {name: why for k, (name, why) in enumerate(found.items()) if why not in list(found.values())[:k]}


class Touched:
    """The nodes that have channels of a stream, and how a change of the channels passes through them."""

    def __init__(self, probe: Probe, units: np.ndarray) -> None:
        self.probe, self.units = probe, units
        self.graph: ChannelGraph = probe.graph
        self.axes: Mapping[str, tuple[Carrier, ...]] = carriers_of_axes(self.graph, units)
        self._has: dict[fx.Node, bool] = {}

    def has(self, node: fx.Node) -> bool:
        """Whether the value of a node has channels of the stream."""
        if node not in self._has:
            self._has[node] = touches(self.graph, self.graph.value(node.name), self.units)
        return self._has[node]

    def stored(self, node: fx.Node) -> list[str]:
        """The stored tensors of a node's module that carry the stream."""
        return [name for name in self.probe.stored(node) if name in self.axes]

    def nodes(self) -> Iterator[fx.Node]:
        """Calls that read or write channels of the stream, in graph order."""
        for node in self.probe.values:
            if node.op not in ("placeholder", "get_attr", "output") and (
                self.has(node) or any(map(self.has, node.all_input_nodes)) or self.stored(node)
            ):
                yield node

    def changed(self, node: fx.Node, value: Any, change: Change) -> Any:
        """A value of ``node``, with a change made to its channels."""
        if node.op == "get_attr":
            name = self.graph.first_name(str(node.target))
            return change(value, self.axes[name]) if name in self.axes else value
        return described(self.graph, node.name, self.graph.value(node.name), self.units, value, change)

    def drawn(self, node: fx.Node) -> Any:
        """Random numbers in place of a value with channels of the stream, and random flags; other values are the example's."""
        value = self.probe.values[node]
        if node.op == "get_attr":
            return value
        if self.has(node) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
            return _mapped(value, self.probe.drawn)
        return value

    def refused(self, node: fx.Node, why: str) -> NothingToRotateError:
        """The reason why the channels cannot be changed at a node."""
        what = type(self.probe.root.get_submodule(str(node.target))).__name__ if node.op == "call_module" else node.format_node()
        return NothingToRotateError(f"node '{node.name}' ({what}) {why}")

    def commutes(self, node: fx.Node, change: Change) -> bool:
        """Whether changing operands and stored tensors changes the node's value alike, or not at all where it has no channel."""
        drawn = {n: self.drawn(n) for n in node.all_input_nodes}
        new = {n: self.changed(n, value, change) for n, value in drawn.items()}
        tensors = {name: change(self.probe.tensors[name].detach(), self.axes[name]) for name in self.stored(node)}
        before = self.changed(node, self.probe.run(node, drawn, {}), change)
        return same(before, self.probe.run(node, new, tensors))


def _mapped(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, function) for each in value)
    if isinstance(value, dict):
        return {key: _mapped(each, function) for key, each in value.items()}
    return value
