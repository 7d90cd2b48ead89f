"""Values inside of networks: kept as a student computes them, and given by a teacher beside its outputs; and which positions of
one are positions of the other once the student has lost channels."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from stp_fx.analysis.build import analyze
from stp_fx.analysis.flow import flow_of
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_a, is_choice, listed_argument, shown
from stp_fx.errors import InputError, PlanError
from stp_fx.ir._torch_compat import is_exporting
from stp_fx.ir.captured import compiled
from stp_fx.ir.in_place import may_write
from stp_fx.ir.modes import graph_of_mode, modes_of
from stp_fx.ir.provenance import has_provenance, provenance_of
from stp_fx.measure.latency import example_values
from stp_fx.rewrite.blocks import find_blocks, trained_calls, values_of
from stp_fx.rewrite.counterparts import KeptPositions
from stp_fx.rewrite.side_by_side import Network
from stp_fx.rules import TensorDims
from stp_fx.text import did_you_mean

__all__ = ["Correspondence", "Tap", "Taps", "Watched", "checked_graph", "named_features"]

_PREFIX = "stp_fx_tap"
_EMPTY = PrunePlan({}, {})
Positions = torch.Tensor | None


class Tap(nn.Module):
    """Passes a value on, and keeps it until it is read, or until the next forward. It has no state of its own."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies = copies
        self.value: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_exporting():
            return x
        self.value = None
        if torch.is_grad_enabled() and not x.is_meta:
            self.value = x.clone() if self.copies else x  # a later call writes into it
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        copied = Tap(self.copies)
        copied.train(self.training)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "value": None}


def checked_graph(argument: str, value: object) -> fx.GraphModule:
    """The value, if it is a captured graph.

    Raises:
        InputError: names the argument.
    """
    if isinstance(value, fx.GraphModule) and has_provenance(value):
        return value
    raise InputError(
        f"features are read in graphs, and `{argument}` is a {type(value).__name__}: give what stp_fx.trace returned (of a "
        "manager, `.model`) and not what is wrapped around it, or features=None"
    )


# -- which values ------------------------------------------------------------------------------------------------------


def named_features(teacher: fx.GraphModule, features: str | Iterable[str]) -> tuple[str, ...]:
    """The nodes of a graph that "blocks" or names stand for: names of nodes, or of modules, for the value computed last in them.

    Raises:
        InputError: an unknown name, a value that is no tensor or is computed in one mode only, or a graph of one block.
    """
    if is_choice(features, ("blocks",)):
        return _ends_of_blocks(teacher)
    wanted = "give 'blocks', or names of nodes or modules of the graph, such as ['layer1', 'layer2']"
    names = listed_argument("features", features, wanted)
    if not names:
        raise InputError(f"`features` is empty: {wanted}, or None for the outputs alone")
    by_module = _last_nodes(teacher)
    modes = {node.name: (node, mode) for node, mode in modes_of(teacher.graph)}
    found: list[str] = []
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"`features` holds {shown(name)}: {wanted}")
        place = by_module.get(name, name) if name not in modes else name
        if place not in modes:
            raise InputError(f"`features`: the teacher has no node or module {name!r}{did_you_mean(name, [*by_module, *modes])}")
        node, mode = modes[place]
        computed = node.op.startswith("call_") and is_a(analyze(teacher).value(place), TensorDims)
        if not computed or mode != "both":
            why = "is computed in one mode only" if computed else "is no computed tensor"
            raise InputError(f"`features`: {name!r} {why}; name a value that training and evaluation compute")
        found.append(place)
    return tuple(dict.fromkeys(found))


def _last_nodes(gm: fx.GraphModule) -> dict[str, str]:
    """By the path of each module: the node that was computed last in it."""
    found: dict[str, str] = {}
    for node in flow_of(gm):
        for scope in () if node.path.startswith(_PREFIX) else (*node.scopes, node.path):
            found[scope.partition("@")[0]] = node.name
    found.pop("", None)
    return found


def _ends_of_blocks(gm: fx.GraphModule) -> tuple[str, ...]:
    network = Network(gm, lambda _: False)
    with torch.no_grad():
        values = values_of(network, example_values(gm))
    calls = [call.node for call in trained_calls(gm)[0] if call.contracts]
    layers = [name for name in calls if network.by_name[name] not in network.left_out]
    both = {node.name: node for node, mode in modes_of(gm.graph) if mode == "both"}
    blocks = find_blocks(network, values, both, layers)[:-1]  # the last one ends at the outputs
    names = tuple(dict.fromkeys(_below_taps(gm, both[name]).name for block in blocks for name in block.targets))
    if not names:
        raise InputError(
            "features='blocks' found one block: nowhere inside of the network does a single value carry all that is computed. "
            "Name nodes or modules, features=['encoder.layer1'], or leave features out"
        )
    return names


def _below_taps(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The output of taps, in a teacher that was copied from a student."""
    while node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Tap):
        node = node.args[0]  # type: ignore[assignment]
    return node


# -- the student -------------------------------------------------------------------------------------------------------


class Taps:
    """Taps in a graph, behind the nodes of these names: they change no number and no state dict, and follow every rewrite.

    Raises:
        InputError: the graph has no node of a name.
    """

    def __init__(self, gm: fx.GraphModule, names: Sequence[str], known: frozenset[str]) -> None:
        nodes = {node.name: node for node, mode in modes_of(gm.graph) if mode == "both"}
        missing = next((name for name in names if name not in nodes), None)
        if missing is not None:
            raise InputError(f"the student computes no {missing!r}, which is a feature of the teacher: {_OTHER_STRUCTURE}")
        self.names: dict[str, str] = {}
        number = 0
        for feature in names:
            while hasattr(gm, f"{_PREFIX}_{number}"):
                number += 1
            self.names[feature] = f"{_PREFIX}_{number}"
            _insert(gm, _with_factor(nodes[feature], known), self.names[feature])
        gm.recompile()

    def take(self, gm: fx.GraphModule) -> dict[str, torch.Tensor]:
        """The values of the last forward, by feature; they are forgotten.

        Raises:
            InputError: there is none.
        """
        found: dict[str, torch.Tensor] = {}
        for feature, name in self.names.items():
            tap = getattr(gm, name, None)
            if not isinstance(tap, Tap):
                raise InputError(f"the student's graph has lost {name!r}, which reads {feature!r}: set `.student` anew")
            if tap.value is not None:
                found[feature], tap.value = tap.value, None
        missing = next((feature for feature in self.names if feature not in found), None)
        if missing is not None:
            raise InputError(
                f"no value of {missing!r} has been seen: call the student, with gradients enabled, before each call of the "
                "distillation (copies of it, and the replicas of DataParallel, are other modules)"
            )
        return found

    def remove(self, gm: fx.GraphModule) -> None:
        """Takes them out of the graph."""
        own = set(self.names.values())
        for node in list(gm.graph.nodes):
            if node.op == "call_module" and node.target in own:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
                delattr(gm, str(node.target))
        gm.recompile()


def _insert(gm: fx.GraphModule, node: fx.Node, name: str) -> None:
    tap = Tap(any(may_write(user, gm) for user in node.users))
    tap.train(gm.training)
    gm.add_module(name, tap)
    with gm.graph.inserting_after(node):
        seen = gm.graph.call_module(name, (node,))
    node.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not seen)


def _with_factor(node: fx.Node, known: frozenset[str]) -> fx.Node:
    """The node, or the product behind it by which a removal keeps the scale of a norm; ``known`` are the teacher's nodes."""
    users = list(node.users)
    behind = users[0] if len(users) == 1 else node
    return behind if behind.target is operator.mul and behind.name not in known else node


# -- the teacher -------------------------------------------------------------------------------------------------------


class Watched:
    """A graph in evaluation that gives named values beside its outputs. It is called with the graph, and has no tensor itself."""

    def __init__(self, gm: fx.GraphModule, names: Sequence[str]) -> None:
        self.graph = gm.graph
        graph = graph_of_mode(gm.graph, training=False)
        graph.set_codegen(CodeGen())
        nodes = {node.name: node for node in graph.nodes}
        values: list[fx.Node] = []
        for name in names:
            node = nodes[name]
            if any(may_write(user, gm) for user in node.users):
                with graph.inserting_after(node):
                    node = graph.call_method("clone", (node,))
            values.append(node)
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        output.args = ((output.args[0], tuple(values)),)
        self._forward: Callable[..., Any] = compiled(graph)
        self._names = tuple(names)

    def __call__(self, gm: fx.GraphModule, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
        output, values = self._forward(gm, *self.graph.process_inputs(*arguments))
        return self.graph.process_outputs(output), dict(zip(self._names, values, strict=True))


# -- what of one is in the other ---------------------------------------------------------------------------------------

_OTHER_STRUCTURE = (
    "features are compared with a teacher of the structure that the student had when it was traced, such as copy.deepcopy of the "
    "unpruned graph; of another one, compare the outputs alone (features=None)"
)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A dimension of a value: which positions of the teacher's are compared, and of the student's ``size`` which (None: all)."""

    dim: int
    teacher: torch.Tensor
    student: Positions
    size: int


class Correspondence:
    """The positions of the teacher's values that the student has and that are not masked in it, and where they are in it.

    Raises:
        InputError: the student is not what is left of the teacher's structure.
    """

    def __init__(self, teacher: fx.GraphModule, student: fx.GraphModule) -> None:
        known, other = provenance_of(student), provenance_of(teacher)
        if known.basis != other.basis or (known.turned and known.turned != other.turned):
            raise InputError(
                "a change of basis (basis='rotate') has made the student's channels combinations of the teacher's, so features "
                "cannot be compared: take the teacher after the change of basis, or features=None"
            )
        self.of: tuple[Any, Any] = (known.plan, known.masked)
        graph = analyze(teacher)
        removed = _removed(other.plan, known.plan)
        masked = _EMPTY if known.masked is None else _without(known.masked, known.added)
        try:
            self._left = KeptPositions(graph, graph.survivors(removed, partial=True))
            self._alive = KeptPositions(graph, graph.survivors(removed.then(masked), partial=True))
        except PlanError as error:
            raise InputError(f"{_OTHER_STRUCTURE}. ({error})") from error
        self._known: dict[tuple[str, torch.device, torch.device], list[_Axis]] = {}

    def pair(self, name: str, wanted: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's value and the student's, of what both have, on the student's device.

        Raises:
            InputError: they are not of one shape, or hold no floating point numbers.
        """
        found = (tuple(wanted.shape), tuple(given.shape))
        for axis in self._axes(name, wanted.device, given.device):
            if axis.dim < given.dim() and given.shape[axis.dim] == axis.size:
                wanted = wanted.index_select(axis.dim, axis.teacher)
                given = given if axis.student is None else given.index_select(axis.dim, axis.student)
        if wanted.shape != given.shape or not (wanted.is_floating_point() and given.is_floating_point()):
            raise InputError(
                f"feature {name!r} is {found[0]}, {wanted.dtype}, in the teacher and {found[1]}, {given.dtype}, in the student: "
                f"give both the same inputs; {_OTHER_STRUCTURE}"
            )
        return wanted.to(given.device), given

    def _axes(self, name: str, teacher: torch.device, student: torch.device) -> list[_Axis]:
        key = (name, teacher, student)
        if key not in self._known:
            left, flags = self._left.of(name), self._left.flags(name)
            self._known[key] = [
                _axis(dim, alive, left.get(dim), len(flags[dim]), teacher, student) for dim, alive in self._alive.of(name).items()
            ]
        return self._known[key]


def _axis(dim: int, alive: torch.Tensor, left: Positions, whole: int, teacher: torch.device, student: torch.device) -> _Axis:
    size = whole if left is None else len(left)
    if len(alive) == size:
        return _Axis(dim, alive.to(teacher), None, size)
    positions = alive if left is None else torch.searchsorted(left, alive)
    return _Axis(dim, alive.to(teacher), positions.to(student), size)


def _removed(teacher: PrunePlan | None, student: PrunePlan | None) -> PrunePlan:
    """The positions of the teacher that the student has lost since they were equal."""
    student = _EMPTY if student is None else student
    if teacher is None:
        return student
    for key, kept in teacher.kept.items():
        if key not in student.kept or not set(student.kept[key].tolist()) <= set(kept.tolist()):
            raise InputError(f"the student has channels of '{key[0]}' dim {key[1]} that the teacher has lost: {_OTHER_STRUCTURE}")
    return student.after(teacher)


def _without(plan: PrunePlan, names: Iterable[str]) -> PrunePlan:
    """A plan without the entries of these tensors, which only the student has."""
    left_out = set(names)
    kept: Mapping[tuple[str, int], Any] = {key: value for key, value in plan.kept.items() if key[0] not in left_out}
    return PrunePlan(kept, {key: plan.sizes[key] for key in kept})
