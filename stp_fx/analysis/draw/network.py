"""The calls of a graph and the edges between them, in networkx: data flow, direct coupling, forced shape matches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from stp_fx.errors import InputError
from stp_fx.rules import TensorDims

if TYPE_CHECKING:
    from stp_fx.analysis.flow import FlowNode
    from stp_fx.analysis.graph import ChannelGraph

__all__ = ["KINDS", "network"]

KINDS = {
    "convolution": ("#a6cee3", ("conv",)),
    "linear or matmul": ("#b2df8a", ("linear", "matmul", "attention", "einsum", "bmm", "embedding", "lstm", "gru", "rnn")),
    "normalisation": ("#fdd49e", ("norm",)),
    "activation": ("#fbb4b9", ("relu", "gelu", "silu", "swish", "sigmoid", "softmax", "tanh", "elu")),
    "pooling": ("#cab2d6", ("pool", "mean", "interpolate", "upsample")),
    "join": ("#ffffb3", ("add", "mul", "sub", "cat", "concat", "stack", "div")),
    "module (folded)": ("#e0e0e0", ()),
    "input, output, parameter": ("#ffffff", ()),
    "other": ("#f0f0f0", ()),
}
_PAGE = 60
"""As many nodes as fit a page legibly."""
_CALLS_SHOWN = 3


def network(graph: ChannelGraph, fold: int | None = None) -> nx.MultiDiGraph:
    """Nodes carry ``label``, ``kind`` (a key of ``KINDS``), ``groups`` (all that its value or parameters touch) and ``home``
    (the one group that its value carries, or None); edges ``relation``:

    - ``"flow"``: the second reads the first;
    - ``"direct"``: it does, and channels of the ``groups`` named go through;
    - ``"forced"``: a third node (``by``) reads both and holds their channels to one shape, as an addition does. Matches inside
      a folded module are not drawn.

    Calls that pass no tensor on (sizes, indices) are not drawn.

    Raises:
        InputError: ``fold`` is negative.
    """
    if fold is not None and fold < 0:
        raise InputError(f"`fold` is a depth of modules, 0 for no folding; got {fold}")
    view = _Calls(graph)
    if fold is not None:
        return view.network(view.folded(fold))
    deepest = max((len(call.scopes) for call in view.calls), default=0)
    places = view.folded(0)
    for depth in range(deepest + 1, 0, -1):
        if len(set(places.values())) <= _PAGE:
            break
        places = view.folded(depth)
    return view.network(places)


class _Calls:
    """The calls that pass tensors on, with the groups that they touch."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        passing = {name for name, value in graph.found.values.items() if any(True for _ in _tensors(value))}
        self.calls = [call for call in graph.found.flow if call.name in passing or not call.op.startswith(("call", "get"))]
        group_of = np.zeros(graph.units, dtype=np.int64)
        for group in graph.groups:
            group_of[group.units] = group.index
        self._carried = {call.name: _carried(graph, group_of, call.name) for call in self.calls}
        self._made = {call.name for call in self.calls if call.op.startswith("call")}
        self._inputs = {call.name: tuple(s for s in call.inputs if s in self._carried) for call in self.calls}
        self._readers: dict[str, list[str]] = {call.name: [] for call in self.calls}
        for name, sources in self._inputs.items():
            for source in sources:
                self._readers[source].append(name)

    def folded(self, depth: int) -> dict[str, str]:
        """Call to the node of the picture that stands for it: itself, the first call of a chain, or a call of a module."""
        place = {call.name: call.name for call in self.calls}
        if not depth:
            return place
        inside: dict[str, list[FlowNode]] = {}
        for call in self.calls:
            if len(call.scopes) >= depth:
                inside.setdefault(call.scopes[depth - 1], []).append(call)
        for scope, members in inside.items():
            if len(members) > 1:
                place.update(dict.fromkeys((member.name for member in members), f"{_FOLDED}{scope}"))
        for call in self.calls:
            if place[call.name] == call.name and self._continues(call, place):
                place[call.name] = place[self._inputs[call.name][0]]
        for call in self.calls:
            if call.op == "get_attr" and len(set(readers := [place[r] for r in self._readers[call.name]])) == 1:
                place[call.name] = readers[0]
        return place

    def _continues(self, call: FlowNode, place: Mapping[str, str]) -> bool:
        """Whether the call only carries on what one other has made, as the norm and the activation after a convolution."""
        sources = self._inputs[call.name]
        if len(sources) != 1 or not call.op.startswith("call") or _kind(call) in ("convolution", "linear or matmul"):
            return False
        (source,) = sources
        return (
            self._readers[source] == [call.name]
            and not place[source].startswith(_FOLDED)
            and source in self._made
            and self._carried[source] == self._carried[call.name]
        )

    def network(self, place: Mapping[str, str]) -> nx.MultiDiGraph:
        result = nx.MultiDiGraph()
        stored = {call.name: self._stored(call) for call in self.calls}
        for at, members in _together(self.calls, place).items():
            touched = [self._carried[c.name] | stored[c.name] for c in members]
            home = self._carried[members[-1].name]
            looks: dict[str, Any] = {"groups": set().union(*touched), "home": min(home) if len(home) == 1 else None}
            result.add_node(at, kind=_kind_of(at, members), label=_label(at, members), **looks)
        for call in self.calls:
            self._connect_inputs(result, place, call, self._carried[call.name] | stored[call.name])
        return result

    def _connect_inputs(self, result: nx.MultiDiGraph, place: Mapping[str, str], call: FlowNode, touched: set[int]) -> None:
        sources = self._inputs[call.name]
        for source in sources:
            _connect(result, place[source], place[call.name], "flow", set())
            if shared := self._carried[source] & touched:
                _connect(result, place[source], place[call.name], "direct", shared)
        for one, other in itertools.combinations(sources, 2):
            if forced := self._carried[one] & self._carried[other]:
                _connect(result, place[one], place[other], "forced", forced, place[call.name])

    def _stored(self, call: FlowNode) -> set[int]:
        """The groups that cut a parameter of the module called."""
        if call.op != "call_module":
            return set()
        return {g.index for g in self._graph.groups if any(m.axis.tensor.startswith(call.path + ".") for m in g.members)}


_FOLDED = "module "


def _together(calls: list[FlowNode], place: Mapping[str, str]) -> dict[str, list[FlowNode]]:
    result: dict[str, list[FlowNode]] = {}
    for call in calls:
        result.setdefault(place[call.name], []).append(call)
    return result


def _connect(result: nx.MultiDiGraph, source: str, target: str, relation: str, groups: set[int], by: str = "") -> None:
    if source in (target, by) or target == by or (relation == "forced" and result.has_edge(target, source, relation)):
        return
    data: dict[str, Any] = result.get_edge_data(source, target, relation) or {}
    result.add_edge(source, target, key=relation, relation=relation, groups=data.get("groups", set()) | groups, by=by)


def _tensors(value: Any) -> Iterator[TensorDims]:
    if isinstance(value, TensorDims):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _carried(graph: ChannelGraph, group_of: np.ndarray, name: str) -> set[int]:
    """The groups whose units the node's value holds."""
    dims = [dim for tensor in _tensors(graph.found.values.get(name)) for dim in tensor.dims]
    ids = [f.ids[f.ids >= 0] for dim in dims for f in dim if f.ids is not None]
    if not ids:
        return set()
    _, units = graph.touched.of(np.unique(graph.solution.label[np.concatenate([i.ravel() for i in ids])]))
    return set(group_of[units].tolist())


def _kind(call: FlowNode) -> str:
    if not call.op.startswith("call"):
        return "input, output, parameter"
    lower = call.call.lower().strip("_")
    return next((kind for kind, (_, words) in KINDS.items() if any(word in lower for word in words)), "other")


def _kind_of(at: str, members: list[FlowNode]) -> str:
    return "module (folded)" if at.startswith(_FOLDED) else _kind(_first(at, members))


def _first(at: str, members: list[FlowNode]) -> FlowNode:
    return next((call for call in members if call.name == at), members[0])


def _label(at: str, members: list[FlowNode]) -> str:
    if at.startswith(_FOLDED):
        path, _, again = at.removeprefix(_FOLDED).partition("@")
        return f"{path}\ncall {int(again) + 1}" if again else path
    first = _first(at, members)
    if not first.op.startswith("call"):
        return first.name
    calls = [call.call for call in members if call.op.startswith("call")]
    more = [f"{len(calls) - _CALLS_SHOWN} more"] if len(calls) > _CALLS_SHOWN + 1 else []
    shown = calls[:_CALLS_SHOWN] if more else calls
    title = first.path if first.op == "call_module" else first.name
    return "\n".join([title, *([", ".join(shown + more)] if [title] != calls else [])])
