"""The calls of a graph and the edges between them, in networkx: data flow, direct coupling, forced shape matches."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stp_fx.checks import is_whole, shown
from stp_fx.errors import InputError
from stp_fx.views.drawing import Call, Drawing

if TYPE_CHECKING:
    import networkx as nx  # at run time only where a picture is made

__all__ = ["FOLDED", "KINDS", "Calls", "is_helper", "kind_of", "network", "together"]

FOLDED = "module (folded)"
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "convolution": ("#a6cee3", ("conv",)),
    "linear or matmul": ("#b2df8a", ("linear", "matmul", "attention", "einsum", "bmm", "embedding", "lstm", "gru", "rnn")),
    "normalisation": ("#fdd49e", ("norm",)),
    "activation": ("#fbb4b9", ("relu", "gelu", "silu", "swish", "sigmoid", "softmax", "tanh", "elu")),
    "pooling": ("#cab2d6", ("pool", "mean", "interpolate", "upsample")),
    "join": ("#ffffb3", ("add", "mul", "sub", "cat", "concat", "stack", "div")),
    FOLDED: ("#e0e0e0", ()),
    "input, output, parameter": ("#ffffff", ()),
    "other": ("#f0f0f0", ()),
}
_PAGE = 60
"""As many nodes as fit a page legibly."""
_CALLS_SHOWN = 3


def network(drawing: Drawing, fold: int | None = None) -> nx.MultiDiGraph[str]:
    """Nodes carry ``label``, ``kind`` (a key of ``KINDS``), ``groups`` (all that its value or parameters touch) and ``home``
    (the one group that its value carries, or None), and ``inside`` (the groups that no other node touches); edges ``relation``:

    - ``"flow"``: the second reads the first;
    - ``"direct"``: it does, and channels of the ``groups`` named go through;
    - ``"forced"``: a third node (``by``) reads both and holds their channels to one shape, as an addition does. Matches inside
      a folded module are not drawn.

    Raises:
        InputError: ``fold`` is negative.
    """
    if fold is not None and (not is_whole(fold) or fold < 0):
        raise InputError(f"`fold` is a depth of modules, 0 for no folding; got {shown(fold)}")
    view = Calls(drawing)
    if fold is not None:
        return view.network(view.folded(fold))
    deepest = max((len(call.scopes) for call in view.calls), default=0)
    places = view.folded(0)
    view.leave_out_helpers(places)
    for depth in range(deepest + 1, 0, -1):
        if len(set(places.values())) <= _PAGE:
            break
        places = view.folded(depth)
    return view.network(places)


class Calls:
    """The calls that pass tensors on, with the groups that they touch; and which of them one box of a picture stands for."""

    def __init__(self, drawing: Drawing) -> None:
        self.calls = drawing.calls
        self._carried = {call.name: call.carried for call in self.calls}
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
        inside: dict[str, list[Call]] = {}
        for call in self.calls:
            if len(call.scopes) >= depth:
                inside.setdefault(call.scopes[depth - 1], []).append(call)
        for scope, members in inside.items():
            if len(members) > 1:
                place.update(dict.fromkeys((member.name for member in members), f"{_FOLDED}{scope}"))
        self._chain(place)
        self.leave_out_helpers(place)
        return place

    def chained(self) -> dict[str, str]:
        """Call to the first call of its chain; a chain ends with the module in whose code it stands."""
        place = {call.name: call.name for call in self.calls}
        self._chain(place, within=True)
        return place

    def _chain(self, place: dict[str, str], *, within: bool = False) -> None:
        scopes = {call.name: call.scopes for call in self.calls}
        for call in self.calls:
            if place[call.name] == call.name and self._continues(call, place):
                (source,) = self._inputs[call.name]
                if not within or scopes[source] == call.scopes:
                    place[call.name] = place[source]
        for call in self.calls:
            if call.op == "get_attr" and len(set(readers := [place[r] for r in self._readers[call.name]])) == 1:
                place[call.name] = readers[0]

    def leave_out_helpers(self, place: dict[str, str]) -> None:
        """Changes ``place``: a call that only picks from the value of one other stands with that one. A call without a channel of
        a group, made of such calls and constants alone (``arange``, a mask), has no place; nor have their constants."""
        helpers: set[str] = set()
        for call in self.calls:
            sources = self._inputs[call.name]
            if is_helper(call) and helpers.issuperset(sources):
                helpers.add(call.name)
            elif call.call == "getitem" and len(sources) == 1 and self._carried[sources[0]] == call.carried:
                place[call.name] = place[sources[0]]
        for call in self.calls:
            if call.name in helpers and (call.op != "get_attr" or helpers.issuperset(self._readers[call.name])):
                del place[call.name]

    def _continues(self, call: Call, place: Mapping[str, str]) -> bool:
        """Whether the call only carries on what one other has made, as the norm and the activation after a convolution."""
        sources = self._inputs[call.name]
        if len(sources) != 1 or not call.op.startswith("call") or kind_of(call) in ("convolution", "linear or matmul"):
            return False
        (source,) = sources
        return (
            self._readers[source] == [call.name]
            and not place[source].startswith(_FOLDED)
            and source in self._made
            and self._carried[source] == self._carried[call.name]
        )

    def edges(self, place: Mapping[str, str]) -> dict[tuple[str, str], frozenset[int]]:
        """Reading between two places, and the groups whose channels go through; in the graph's order.

        Parameters that a function reads count for its module, as the module's own do.
        """
        touched = {
            at: frozenset().union(*(c.carried | c.stored for c in calls)) for at, calls in together(self.calls, place).items()
        }
        result: dict[tuple[str, str], frozenset[int]] = {}
        for call in self.calls:
            for source in self._inputs[call.name]:
                key = place[source], place[call.name]
                if key[0] != key[1]:
                    shared = self._carried[source] & touched[key[1]]
                    result[key] = result.get(key, frozenset()) | shared
        return result

    def network(self, place: Mapping[str, str]) -> nx.MultiDiGraph[str]:
        import networkx as nx

        result = nx.MultiDiGraph()
        for at, members in together([call for call in self.calls if call.name in place], place).items():
            touched = [c.carried | c.stored for c in members]
            home = self._carried[members[-1].name]
            looks: dict[str, Any] = {"groups": frozenset().union(*touched), "home": min(home) if len(home) == 1 else None}
            result.add_node(at, kind=_kind_of(at, members), label=_label(at, members), **looks)
        nodes = collections.Counter(group for _, groups in result.nodes(data="groups") for group in groups)
        for _, data in result.nodes(data=True):
            data["inside"] = tuple(sorted(group for group in data["groups"] if nodes[group] == 1))
        for call in self.calls:
            if call.name in place:
                self._connect_inputs(result, place, call)
        return result

    def _connect_inputs(self, result: nx.MultiDiGraph, place: Mapping[str, str], call: Call) -> None:
        sources, touched = [each for each in self._inputs[call.name] if each in place], call.carried | call.stored
        for source in sources:
            _connect(result, place[source], place[call.name], "flow", frozenset())
            if shared := self._carried[source] & touched:
                _connect(result, place[source], place[call.name], "direct", shared)
        for one, other in itertools.combinations(sources, 2):
            if forced := self._carried[one] & self._carried[other]:
                _connect(result, place[one], place[other], "forced", forced, place[call.name])


_FOLDED = "module "


def together(calls: Iterable[Call], place: Mapping[str, str]) -> dict[str, list[Call]]:
    """The calls of every place, both in the graph's order."""
    result: dict[str, list[Call]] = {}
    for call in calls:
        result.setdefault(place[call.name], []).append(call)
    return result


def _connect(result: nx.MultiDiGraph, source: str, target: str, relation: str, groups: frozenset[int], by: str = "") -> None:
    if source in (target, by) or target == by or (relation == "forced" and result.has_edge(target, source, relation)):
        return
    data: dict[str, Any] = result.get_edge_data(source, target, relation) or {}
    result.add_edge(source, target, key=relation, relation=relation, groups=data.get("groups", frozenset()) | groups, by=by)


def kind_of(call: Call) -> str:
    """The key of ``KINDS`` that a call belongs to, by its name."""
    if not call.op.startswith("call"):
        return "input, output, parameter"
    lower = call.call.lower().strip("_")
    return next((kind for kind, (_, words) in KINDS.items() if any(word in lower for word in words)), "other")


def is_helper(call: Call) -> bool:
    """Whether a call computes without a layer, and without a channel of any group; a stored tensor without one is such, too."""
    computes = call.op in ("call_function", "call_method") and kind_of(call) not in ("convolution", "linear or matmul")
    return (computes or call.op == "get_attr") and not call.carried and not call.stored


def _kind_of(at: str, members: list[Call]) -> str:
    return FOLDED if at.startswith(_FOLDED) else kind_of(_first(at, members))


def _first(at: str, members: list[Call]) -> Call:
    return next((call for call in members if call.name == at), members[0])


def _label(at: str, members: list[Call]) -> str:
    if at.startswith(_FOLDED):
        path, _, again = at.removeprefix(_FOLDED).partition("@")
        return f"{path}\ncall {int(again) + 1}" if again else path
    first = _first(at, members)
    if not first.op.startswith("call"):
        return first.name
    calls = [call.call for call in members if call.op.startswith("call") and (call is first or call.call != "getitem")]
    more = [f"{len(calls) - _CALLS_SHOWN} more"] if len(calls) > _CALLS_SHOWN + 1 else []
    shown = calls[:_CALLS_SHOWN] if more else calls
    title = first.path if first.op == "call_module" else first.name
    return "\n".join([title, *([", ".join(shown + more)] if [title] != calls else [])])
