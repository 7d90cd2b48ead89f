"""The second front end: what Python's tracer cannot follow, ``torch.export`` can; its ATen calls are raised to PyTorch's own.

Exported graphs bake sizes, devices and the mode in. Here sizes stay free where the model leaves them free (a size that it does
not is asserted), devices follow the input, and calls that differ between an export in training and one in evaluation follow
``.train()`` and ``.eval()``.
"""

from __future__ import annotations

import ast
import logging
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.node import map_arg

from stp_fx.errors import TraceError
from stp_fx.ir.batch_of_one import allow_one, batch_of_one
from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.kept import containers_kept
from stp_fx.ir.outputs import Rebuild, is_plain
from stp_fx.ir.shapes import fetch
from stp_fx.ir.spelling import SPELLED
from stp_fx.ir.stored import COUNTER, count_batches, store_as_model
from stp_fx.ir.train_eval import mode_calls, modes_kept, switch_modes

__all__ = ["capture_with_export"]

_log = logging.getLogger(__name__)
_OUTPUT = "stp_fx_output"
_DROPPED = {
    "aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}  # fmt: skip
_EFFECTS = {torch._assert, "copy_", "add_", "fill_"}
_COUNT = "num_batches_tracked"
"""What a batch norm adds one to in training. Graphs that differ in that alone are alike."""
_SAME = {"aten.alias", "aten.lift_fresh_copy", "aten.lift_fresh", "aten.detach_"}


def capture_with_export(model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> fx.GraphModule:
    """A GraphModule over the model's own parameters and buffers, in its mode, with a placeholder for each tensor.

    ``arguments`` are those of ``forward`` by parameter name, ``named`` the ones that were given by name.

    Raises:
        TraceError: ``torch.export`` cannot capture it.
    """
    now = _exported(model, arguments, named, model.training)
    calls = mode_calls(now.graph)
    try:
        other = _exported(model, arguments, named, not model.training)
    except TraceError:
        other = None
    if other is not None and _alike(now.graph, other.graph):
        trained, evaluated = (mode_calls(each.graph) for each in ((now, other) if model.training else (other, now)))
        gm = now if model.training else other  # in training dropout says its probability
        names = {name for name, training in trained.items() if training and evaluated.get(name) is False}
    else:
        mode = "train" if model.training else "eval"
        _log.warning("%s: its graphs for training and evaluation differ; this one is for %s mode", type(model).__name__, mode)
        gm, names = now, {name for name, training in calls.items() if not training} if not model.training else set()
    _allow_one(gm, model, arguments, named)
    gm.train(model.training)
    if names:
        switch_modes(gm, names, model.training)
    gm.recompile()
    return gm


def _allow_one(gm: fx.GraphModule, model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> None:
    """Lets a batch of one pass, if the graph for it is the same."""
    one = batch_of_one(arguments)
    if one is None:
        return
    try:
        single = _exported(model, one, named, gm.training)
    except TraceError as error:
        _log.debug("%s: no graph for a batch of one: %s", type(model).__name__, error)
        return
    allow_one(gm, one, single)


def _alike(first: fx.Graph, second: fx.Graph) -> bool:
    """Whether two graphs make the same calls, whatever they assert of sizes and how tensors lie in memory."""
    ignored = lambda n: _is_arithmetic(n) or n.target in ("contiguous", COUNTER) or _COUNT in str(n.target)  # noqa: E731
    calls = [[(n.op, n.target) for n in graph.nodes if not ignored(n)] for graph in (first, second)]
    return calls[0] == calls[1] and mode_calls(first).keys() == mode_calls(second).keys()


def _is_arithmetic(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", "")
    return (
        node.target in ("size", torch._assert)
        or module in ("_operator", "math")
        or "sym_" in getattr(node.target, "__name__", "")
    )


def _exported(model: nn.Module, arguments: dict[str, Any], named: frozenset[str], training: bool) -> fx.GraphModule:
    try:
        with modes_kept(model), containers_kept(model, []):
            if training != model.training:
                model.train(training)
            args = tuple(value for name, value in arguments.items() if name not in named)
            kwargs = {name: value for name, value in arguments.items() if name in named}
            every = pytree.tree_map(_free_sizes, dict(arguments))
            program = torch.export.export(model, args, kwargs, dynamic_shapes=every, strict=False)
            source = program.module(check_guards=False)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise TraceError(f"{type(error).__name__}: {lines[0][:300]}") from error
    return _Raised(model, source, program, training).graph_module()


def _free_sizes(value: Any) -> dict[int, Any] | None:
    """All of them, but for 0 and 1, which ``torch.export`` fixes."""
    if not isinstance(value, torch.Tensor):
        return None
    return {dim: torch.export.Dim.AUTO for dim, size in enumerate(value.shape) if size > 1}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class _Raised:
    """One exported graph, node by node, as calls that the rest of the library knows."""

    def __init__(self, model: nn.Module, source: fx.GraphModule, program: Any, training: bool) -> None:
        self.model, self.source, self.training = model, source, training
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self._device: fx.Node | None = None
        self._literal_device = next((v.device for v in pytree.tree_leaves(program.example_inputs) if _is_tensor(v)), None)
        self._spec = program.call_spec.out_spec
        self._guards: list[str] = list(program._guards_code)

    def graph_module(self) -> CapturedGraph:
        for node in self.source.graph.nodes:
            if node.op == "placeholder" and (node.users or isinstance(node.meta.get("val"), torch.Tensor)):
                self.env[node] = self.graph.placeholder(str(node.target))  # constants that the example held have no users
        self._assert_fixed_sizes()
        for condition in self._guards:
            self._assert(condition)
        for node in self.source.graph.nodes:
            if node.op == "output":
                self._finish(node)
            elif node.op != "placeholder":
                self.env[node] = self._copy(self.source, node)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("get_attr", "call_method", "call_function") and node.target not in _EFFECTS:
                self.graph.erase_node(node)
        self.graph.lint()
        gm = CapturedGraph(self.root, self.graph, class_name=type(self.model).__name__).train(self.training)
        store_as_model(gm, self.model, self._called())
        count_batches(gm, self.model, self.training)
        return gm

    def _called(self) -> list[nn.Module]:
        """The modules of the model whose forward the exported graph went through."""
        stacks = [node.meta.get("nn_module_stack") or {} for node in self.source.graph.nodes]
        paths = {path.partition("@")[0] for stack in stacks for path, _ in stack.values()}
        return [module for name, module in self.model.named_modules(remove_duplicate=False) if name in paths]

    def _assert_fixed_sizes(self) -> None:
        """Sizes that the model's code has settled are asserted, and that free ones are at least 2.

        ``torch.export`` takes the latter for granted, and a model may go another way for 1.
        """
        for node in list(self.env):
            value = node.meta.get("val")
            for dim, example in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
                size = example.node.maybe_as_int() if isinstance(example, torch.SymInt) else example
                found = self.graph.call_method("size", (self.env[node], dim))
                if size is None:
                    holds = self.graph.call_function(operator.ge, (found, 2))
                    message = f"{node.target} must have at least size 2 in dimension {dim}: captured with torch.export"
                else:
                    holds = self.graph.call_function(operator.eq, (found, size))
                    message = f"{node.target} must have size {size} in dimension {dim}, as the example had"
                self.graph.call_function(torch._assert, (holds, message))

    def _assert(self, condition: str) -> None:
        """A guard, as ``torch.export`` writes them (``L['x'].size()[0] <= 2``), as nodes of the graph."""
        inputs = {str(node.target): value for node, value in self.env.items()}
        try:
            holds = _as_nodes(self.graph, ast.parse(condition, mode="eval").body, inputs)
        except (KeyError, SyntaxError) as error:
            raise TraceError(f"it holds only while {condition}, which cannot be written into the graph") from error
        if isinstance(holds, fx.Node):
            self.graph.call_function(torch._assert, (holds, f"the graph holds only while {condition}, as for the example"))

    def _copy(self, owner: fx.GraphModule, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._stored(owner, str(node.target))
        if node.op == "call_module":
            raise TraceError(f"the exported graph calls the module {node.target!r}, which is not expected here")
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: self.env[n])
        if node.target in _regions():
            return self._inlined(node, args)
        result = self._raise(node, args, kwargs)
        if isinstance(result, fx.Node) and result.op != "placeholder":
            for key in ("stack_trace", "nn_module_stack"):
                if key in node.meta:
                    result.meta.setdefault(key, node.meta[key])
        return result

    def _stored(self, owner: fx.GraphModule, target: str) -> Any:
        value = fetch(owner, target)
        if isinstance(value, nn.Module):
            return value  # the body of a region
        own = _known(self.model, target)
        name = target if own is not None else target.replace(".", "_")
        self.root.setdefault(name, value if own is None else own)
        return self.graph.get_attr(name)

    def _inlined(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A block under ``no_grad`` or ``autocast``: its nodes, detached where it had no gradients."""
        at = next(k for k, a in enumerate(args) if isinstance(a, fx.GraphModule))
        if isinstance(args[0], str) and args[2]:  # device, dtype, whether it is enabled
            raise TraceError("the forward enables autocast itself, which a graph does not hold")
        body, inputs = args[at], iter(args[at + 1 :])
        outer, outputs = self.env, ()
        self.env = {}
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                self.env[inner] = next(inputs)
            elif inner.op == "output":
                outputs = map_arg(inner.args[0], lambda n: self.env[n])
            else:
                self.env[inner] = self._copy(body, inner)
        self.env = outer
        if args[0] is False:
            return tuple(self.graph.call_method("detach", (v,)) if isinstance(v, fx.Node) else v for v in outputs)
        return tuple(outputs)

    def _raise(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = node.target
        if target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if not isinstance(target, torch._ops.OpOverload):
            return self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        packet = f"{target.namespace}.{target._opname}"
        if packet in _DROPPED:
            return None
        if packet in _SAME:
            return args[0]
        kwargs = self._portable(kwargs)
        if packet == "aten.scaled_dot_product_attention" and kwargs.get("scale") is None:
            kwargs["scale"] = node.args[0].meta["val"].shape[-1] ** -0.5  # type: ignore[union-attr]  # whatever is pruned
        special = SPELLED.get(packet)
        if special is not None:
            return special(self.graph, args, kwargs)
        name = target._opname
        if target.namespace == "aten" and isinstance(args[0] if args else None, fx.Node) and _is_method(name):
            return self.graph.call_method(name, args, kwargs)
        function = getattr(torch, name, None) or getattr(F, name, None)
        if target.namespace == "aten" and callable(function) and not name.startswith("_"):
            return self.graph.call_function(function, args, kwargs)
        return self.graph.call_function(target, args, kwargs)

    def _portable(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without memory hints, and on the input's device in place of the one of the export."""
        kept = {k: v for k, v in kwargs.items() if k not in ("layout", "pin_memory", "non_blocking", "memory_format")}
        if kept.get("device") is not None and torch.device(kept["device"]) == self._literal_device:
            if self._device is None:
                first = next(n for n in self.graph.nodes if n.op == "placeholder")
                with self.graph.inserting_after([n for n in self.graph.nodes if n.op == "placeholder"][-1]):
                    self._device = self.graph.call_function(getattr, (first, "device"))
            kept["device"] = self._device
        return kept

    def _finish(self, node: fx.Node) -> None:
        values: list[Any] = list(map_arg(node.args[0], lambda n: self.env[n]))  # type: ignore[arg-type]
        if is_plain(self._spec):
            self.graph.output(pytree.tree_unflatten(values, self._spec))
            return
        self.root[_OUTPUT] = Rebuild(self._spec)
        self.graph.output(self.graph.call_module(_OUTPUT, tuple(values)))


def _is_method(name: str) -> bool:
    """Whether tensors have a method that takes what the ATen op takes; those written in Python may sort arguments otherwise."""
    return isinstance(getattr(torch.Tensor, name, None), types.MethodDescriptorType) or name in ("split", "norm")


def _as_nodes(graph: fx.Graph, part: ast.expr, inputs: dict[str, Any]) -> Any:
    """An expression over sizes of inputs; raises KeyError for what such expressions do not have."""
    if isinstance(part, ast.Constant):
        return part.value
    if isinstance(part, ast.Compare) and len(part.ops) == 1:
        return graph.call_function(
            _OPERATORS[type(part.ops[0])],
            (_as_nodes(graph, part.left, inputs), _as_nodes(graph, part.comparators[0], inputs)),
        )
    if isinstance(part, ast.BinOp):
        both = (_as_nodes(graph, part.left, inputs), _as_nodes(graph, part.right, inputs))
        return graph.call_function(_OPERATORS[type(part.op)], both)
    if isinstance(part, ast.UnaryOp):
        return graph.call_function(_OPERATORS[type(part.op)], (_as_nodes(graph, part.operand, inputs),))
    match part:
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=tensor, attr="size"), args=[]), slice=ast.Constant(value=int(dim))
        ):
            return graph.call_method("size", (_as_nodes(graph, tensor, inputs), dim))
        case ast.Call(func=ast.Attribute(value=ast.Name(id=("torch" | "math") as module), attr=name)) if name in _FUNCTIONS:
            function = getattr(torch if module == "torch" else math, name)
            return graph.call_function(function, tuple(_as_nodes(graph, each, inputs) for each in part.args))
        case ast.BoolOp():
            first, *rest = (_as_nodes(graph, each, inputs) for each in part.values)
            for each in rest:
                first = graph.call_function(_OPERATORS[type(part.op)], (first, each))
            return first
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))):
            return inputs[name]
    raise KeyError(ast.dump(part))


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.Not: operator.not_, ast.And: operator.and_, ast.Or: operator.or_,
}  # fmt: skip
_FUNCTIONS = {"sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "floor", "ceil", "trunc"}


def _regions() -> set[Any]:
    from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled

    return {wrap_with_autocast, wrap_with_set_grad_enabled}


def _known(model: nn.Module, target: str) -> Any:
    try:
        value = fetch(model, target)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None
