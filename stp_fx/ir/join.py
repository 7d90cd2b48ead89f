"""Two captures of one model, in training and in evaluation, made one graph.

Nodes that call the same with the same are one node for both modes. The other nodes of either stand between marks
(:mod:`stp_fx.ir.modes`). Where a node reads tensors of one shape, or numbers, that differ by mode, it reads a choice of the two:
so a branch of a few nodes stays one of a few nodes, and the network behind it is not there twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.modes import CHOICE, MARKS, add_mode_modules
from stp_fx.ir.nested import leaves_of
from stp_fx.ir.outputs import Rebuild
from stp_fx.ir.provenance import example_of
from stp_fx.ir.runner import run_node
from stp_fx.ir.shapes import meta_twin
from stp_fx.ir.stored import COUNTER
from stp_fx.ir.train_eval import AutogradCall, mode_calls, switch_modes, take_flags

__all__ = ["joined"]

_MARK_OF = {mode: name for name, mode in MARKS.items()}


def joined(trained: CapturedGraph, evaluated: CapturedGraph, model: nn.Module) -> CapturedGraph:
    """One graph that does in training what the first does and in evaluation what the second does.

    The graph of the mode that ``model`` is in becomes the result; the other must not be used any more.
    """
    host, other = (trained, evaluated) if model.training else (evaluated, trained)
    _rename_apart(host, other, model)
    join = _Join(trained, evaluated)
    graph = join.graph()
    if join.alike:
        switches = join.switches if host is trained else {name for name, twin in join.twins.items() if twin in join.switches}
    else:
        _take_in(host, other, {id(module) for module in model.modules()})
        add_mode_modules(host)
        host.graph = graph
        switches = join.switches
    take_flags(host, model)
    if switches:
        switch_modes(host, switches, model.training)
        host.recompile()
    return host


@dataclasses.dataclass(frozen=True)
class _Two:
    """The two values of one argument of a call, in training and in evaluation."""

    trained: Any
    evaluated: Any


class _Apart(Exception):
    """Two calls cannot be one."""


class _Join:
    """``switches``: nodes whose literal ``training`` follows the mode; ``alike``: whether that is all that differs."""

    def __init__(self, trained: CapturedGraph, evaluated: CapturedGraph) -> None:
        self._sides = (trained, evaluated)
        self._known: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})
        self._waiting: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        self._calls = tuple(mode_calls(each.graph) for each in self._sides)
        self._values: list[dict[fx.Node, Any] | None] = [None, None]
        self._choices: dict[tuple[Any, Any], fx.Node] = {}
        self._new = fx.Graph(tracer_cls=trained.graph._tracer_cls)
        self._mode = "both"
        self.switches: set[str] = set()
        self.twins: dict[str, str] = {}
        self.alike = True

    def graph(self) -> fx.Graph:
        """The graph of both."""
        for one, two in self._pairs():
            if one is not None and two is not None:
                self._both(one, two)
                continue
            for side, node in enumerate((one, two)):
                if node is not None:
                    self._waiting[side].append(node)
        return self._new

    def _pairs(self) -> Iterator[tuple[fx.Node | None, fx.Node | None]]:
        """The nodes of both in order, side by side where they call the same."""
        one, two = (list(each.graph.nodes) for each in self._sides)
        two = [node for node in two if node.target != COUNTER]  # training says what is counted, and evaluation counts nothing
        keys = [[_key(node) for node in nodes] for nodes in (one, two)]
        if keys[0] == keys[1]:
            yield from zip(one, two, strict=True)
            return
        for tag, i, j, k, m in difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
            if tag == "equal":
                yield from zip(one[i:j], two[k:m], strict=True)
            else:
                yield from ((node, None) for node in one[i:j])
                yield from ((None, node) for node in two[k:m])

    def _both(self, one: fx.Node, two: fx.Node) -> None:
        try:
            args, kwargs = self._met((one.args, one.kwargs), (two.args, two.kwargs), one, two)
            self._check_numbers((args, kwargs), one, two)
        except _Apart:
            if one.op == "output":
                self._flush()
                args, kwargs = (self._choice(_Two(one.args[0], two.args[0])),), {}
            else:
                self._waiting[0].append(one)
                self._waiting[1].append(two)
                return
        self._flush()
        node = self._new.create_node(one.op, one.target, self._made(args), self._made(kwargs), one.name, one.type)
        node.meta = {**two.meta, **one.meta}
        self._known[0][one] = self._known[1][two] = node
        if self._follows(one, two):
            self.switches.add(node.name)
        self.twins[two.name] = node.name

    def _follows(self, one: fx.Node, two: fx.Node) -> bool:
        return self._calls[0].get(one.name) is True and self._calls[1].get(two.name) is False

    # -- what two calls hold -----------------------------------------------------------------------------------------

    def _met(self, one: Any, two: Any, *calls: fx.Node) -> Any:
        """The arguments for both, with a :class:`_Two` where they differ."""
        if isinstance(one, fx.Node) and isinstance(two, fx.Node):
            known = self._known[0].get(one), self._known[1].get(two)
            if known[0] is not None and known[0] is known[1]:
                return known[0]
            if not self._same_shape(one, two):
                raise _Apart
            return _Two(one, two)
        if isinstance(one, slice) and isinstance(two, slice):
            return slice(*(self._met(getattr(one, part), getattr(two, part), *calls) for part in ("start", "stop", "step")))
        if isinstance(one, dict) and isinstance(two, dict) and list(one) == list(two):
            return {key: self._met(value, two[key], *calls) for key, value in one.items()}
        if isinstance(one, (list, tuple)) and type(one) is type(two) and len(one) == len(two):
            items = [self._met(a, b, *calls) for a, b in zip(one, two, strict=True)]
            return type(one)(*items) if hasattr(one, "_fields") else type(one)(items)
        if type(one) is type(two) and (one is two or one == two or (one != one and two != two)):
            return one
        if one is True and two is False and self._follows(*calls):
            return True  # becomes a switch
        if _may_vary(one) and _may_vary(two) and not (type(one) is int is type(two)):
            return _Two(one, two)  # two whole numbers may be sizes, on which shapes depend
        raise _Apart

    def _check_numbers(self, arguments: Any, one: fx.Node, two: fx.Node) -> None:
        """Numbers that differ by mode may decide on shapes (``keepdim``, ``scale_factor``); then the calls are not one."""
        if all(isinstance(each.trained, fx.Node) for each in leaves_of(_Two, arguments)):
            return
        shapes = [[v.shape for v in leaves_of(torch.Tensor, self._value(k, node))] for k, node in enumerate((one, two))]
        if shapes[0] != shapes[1]:
            raise _Apart

    def _same_shape(self, *pair: fx.Node) -> bool:
        values = [self._value(side, node) for side, node in enumerate(pair)]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return len(tensors) == 2 and tensors[0].shape == tensors[1].shape and tensors[0].dtype == tensors[1].dtype

    def _value(self, side: int, node: fx.Node) -> Any:
        known = self._values[side]
        if known is None:
            known = self._values[side] = _values_of(self._sides[side])
        return known.get(node)

    # -- making nodes ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Makes the nodes of one mode that wait, and goes on in both."""
        for side, mode in enumerate(("train", "eval")):
            waiting = self._waiting[side]
            if all(node.op == "get_attr" or node.target == COUNTER for node in waiting):
                mode = "both"  # a counter asks for the mode itself
            self._enter(mode if waiting else self._mode)
            for node in waiting:
                self.alike = False
                known = self._known[side]
                known[node] = self._new.node_copy(node, known.__getitem__)
            waiting.clear()
        self._enter("both")

    def _enter(self, mode: str) -> None:
        if mode != self._mode:
            self._new.call_module(_MARK_OF[mode])
            self._mode = mode

    def _made(self, value: Any) -> Any:
        if isinstance(value, _Two):
            return self._choice(value)
        if isinstance(value, dict):
            return {key: self._made(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._made(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, slice):
            return slice(*map(self._made, (value.start, value.stop, value.step)))
        return value

    def _choice(self, two: _Two) -> fx.Node:
        sides = (two.trained, two.evaluated)
        args = tuple(map_arg(each, known.__getitem__) for each, known in zip(sides, self._known, strict=True))
        key = args if all(isinstance(each, fx.Node) for each in args) else (repr(args), id(two))
        if key not in self._choices:
            self.alike = False
            self._choices[key] = self._new.call_module(CHOICE, args)
        return self._choices[key]


def _key(node: fx.Node) -> tuple[Any, ...]:
    """The facts that two nodes must share to be compared: the call, and the modules in whose code it stands."""
    target = node.target if isinstance(node.target, str) else id(node.target)
    return node.op, target, tuple(node.meta.get("nn_module_stack") or ())


def _may_vary(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _values_of(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """The values of all nodes, on the meta device; none from a node on that does not run there."""
    twin, given, env = meta_twin(gm).eval(), iter(example_of(gm)), {}
    try:
        with torch.no_grad(), MetaRun():
            for node in gm.graph.nodes:
                env[node] = run_node(node, env.__getitem__, twin, given)
    except Exception:
        return env
    return env


# -- one home for the tensors and modules of both ---------------------------------------------------------------------


def _rename_apart(host: CapturedGraph, other: CapturedGraph, model: nn.Module) -> None:
    """A tensor that tracing itself stored gets another name in ``other`` where ``host`` has something else under it."""
    own = {*model._parameters, *model._buffers, *model._modules, COUNTER}
    renamed: dict[str, str] = {}
    for node in other.graph.nodes:
        name = str(node.target)
        if node.op not in ("get_attr", "call_module") or "." in name or name in own:
            continue
        if name not in renamed and hasattr(host, name) and not _equal(getattr(host, name), getattr(other, name)):
            taken = {*renamed.values(), *dir(host), *dir(other)}
            renamed[name] = next(f"{name}_{k}" for k in itertools.count() if f"{name}_{k}" not in taken)
        node.target = renamed.get(name, name)
    for name, new in renamed.items():
        stores: tuple[Any, ...] = (other.__dict__, other._buffers, other._modules)
        for store in stores:
            if name in store:
                store[new] = store.pop(name)
        if name in other._non_persistent_buffers_set:
            other._non_persistent_buffers_set.add(new)


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one is two or (one.dtype == two.dtype and one.device == two.device and not one.is_meta and torch.equal(one, two))
    if isinstance(one, AutogradCall) and isinstance(two, AutogradCall):
        return one.function is two.function
    if isinstance(one, Rebuild) and isinstance(two, Rebuild):
        return bool(one.spec == two.spec)
    return one is two


def _take_in(host: nn.Module, other: nn.Module, whole: set[int]) -> None:
    """Gives ``host`` what only ``other`` stores; ``whole``: the model's own modules, which both hold as they are."""
    for store in ("_parameters", "_buffers"):
        for name, tensor in other.__dict__[store].items():
            if name not in host.__dict__[store]:
                host.__dict__[store][name] = tensor
                if name in other._non_persistent_buffers_set:
                    host._non_persistent_buffers_set.add(name)
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor) and name not in vars(host):
            setattr(host, name, value)
    for name, module in other._modules.items():
        mine = host._modules.get(name)
        if mine is None or (id(module) in whole and id(mine) not in whole):
            host._modules[name] = module
        elif module is not None and mine is not module and id(mine) not in whole:
            _take_in(mine, module, whole)
