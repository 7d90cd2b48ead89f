"""The second front end's raiser: one exported graph, node by node, as calls that the rest of the library knows.

An export for training is not functional: it writes where the model writes. Writing calls are kept, in order, and a view of
ATen is raised to a call that gives a view.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.node import map_arg

from stp_fx.errors import TraceError
from stp_fx.ir._torch_compat import exported_module, guards_of
from stp_fx.ir.base_tracer import ReplayTracer
from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.constant_inputs import assert_constants, constant_inputs
from stp_fx.ir.export_calls import python_call, schema_of, written_later
from stp_fx.ir.export_guards import as_nodes, in_order
from stp_fx.ir.export_leaves import LEAF, Leaf
from stp_fx.ir.nested import holds
from stp_fx.ir.outputs import Rebuild, is_plain, kept_outputs
from stp_fx.ir.schema import writes_to
from stp_fx.ir.shapes import fetch
from stp_fx.ir.spelling import SPELLED
from stp_fx.ir.stored import count_batches, put_in_order, store_as_model
from stp_fx.ir.train_eval import AutogradCall

__all__ = ["Raised"]

_OUTPUT = "stp_fx_output"
_DROPPED = {
    "aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}  # fmt: skip
_SAME = {"aten.alias", "aten.lift_fresh"}
_FORMATS = (torch.channels_last, torch.channels_last_3d)


class Raised:
    """One exported graph on its way to a graph of PyTorch's own calls.

    Args:
        model: whose forward was exported.
        program: what the export gave.
        arguments: of the forward, by name, in its order.
        named: the arguments that were given by name.
        leaves: the calls that the export has kept, by number.
        training: the mode of the export.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Any,
        arguments: Mapping[str, Any],
        named: frozenset[str],
        leaves: Sequence[Leaf],
        training: bool,
    ) -> None:
        self.model, self.training, self._leaves = model, training, leaves
        self.source: fx.GraphModule = exported_module(program)
        self.graph = fx.Graph(tracer_cls=ReplayTracer)
        self.root: dict[str, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self.notes: tuple[str, ...] = ()
        self._arguments, self._named = arguments, named
        self._inputs: dict[str, fx.Node] = {}
        self._effects: set[fx.Node] = set()
        self._without_gradient = 0
        self._device: fx.Node | None = None
        self._literal_device = next((v.device for v in pytree.tree_leaves(program.example_inputs) if _is_tensor(v)), None)
        self._spec = program.call_spec.out_spec
        self._guards: list[str] = in_order(guards_of(program, [name for name in arguments if name not in named]))

    def graph_module(self) -> CapturedGraph:
        """The graph, over the model's own modules, parameters and buffers.

        Raises:
            TraceError: it does what a graph cannot hold.
        """
        self._place_inputs()
        self._assert_fixed_sizes()
        for condition in self._guards:
            self._assert(condition)
        for node in self.source.graph.nodes:
            if node.op == "output":
                self._finish(node)
            elif node.op != "placeholder":
                self.env[node] = self._copy(self.source, node)
        for node in reversed(list(self.graph.nodes)):
            pure = node.op in ("get_attr", "call_method", "call_function") and node not in self._effects
            if pure and not node.users and node.target is not torch._assert:
                self.graph.erase_node(node)
        self.graph.lint()
        gm = CapturedGraph(self.root, self.graph, class_name=type(self.model).__name__)
        gm.training = self.training
        store_as_model(gm, self.model, self._called())
        put_in_order(gm, self.model)
        self.notes += count_batches(gm, self.model, self.training)
        return gm

    def _called(self) -> list[nn.Module]:
        """The modules of the model whose forward the exported graph went through."""
        stacks = [node.meta.get("nn_module_stack") or {} for node in self.source.graph.nodes]
        paths = {path.partition("@")[0] for stack in stacks for path, _ in stack.values()}
        return [module for name, module in self.model.named_modules(remove_duplicate=False) if name in paths]

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _place_inputs(self) -> None:
        """A placeholder for each argument that holds a tensor; tensors in lists and dicts are taken out of them."""
        flat = [n for n in self.source.graph.nodes if n.op == "placeholder"]
        by_position = [name for name in self._arguments if name not in self._named]
        order = [*by_position, *(name for name in self._arguments if name in self._named)]
        taken, constants = constant_inputs(self._arguments, self._named), dict[str, fx.Node]()
        paths = {name: pytree.tree_flatten_with_path(self._arguments[name])[0] for name in order}
        if sum(map(len, paths.values())) != len(flat):
            raise TraceError(f"its {len(flat)} inputs are not the {sum(map(len, paths.values()))} values of the example")
        for name, value in self._arguments.items():
            if holds(torch.Tensor, value):
                self._inputs[name] = self.graph.placeholder(name)
            elif name in taken:
                default = (value,) if taken[name] else ()
                constants[name] = self.graph.create_node("placeholder", name, default)
        sources = iter(flat)
        for name in order:
            for path, value in paths[name]:
                source = next(sources)
                if isinstance(value, torch.Tensor):
                    self.env[source] = self._taken_out(name, path)
        self._first_tensor = next(iter(self.env.values()))
        self._last_input = next(iter(reversed(self.graph.nodes)))
        assert_constants(self.graph, constants, self._arguments)

    def _taken_out(self, name: str, path: Any) -> fx.Node:
        node = self._inputs[name]
        for key in path:
            if not isinstance(key, (pytree.SequenceKey, pytree.MappingKey)):
                raise TraceError(
                    f"its input {name!r} holds tensors in an object that a graph cannot take apart: give them by name"
                )
            item = key.idx if isinstance(key, pytree.SequenceKey) else key.key
            node = self.graph.call_function(operator.getitem, (node, item))
        return node

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
                    holds_for = self.graph.call_function(operator.ge, (found, 2))
                    message = f"{node.target} must have at least size 2 in dimension {dim}: captured with torch.export"
                else:
                    holds_for = self.graph.call_function(operator.eq, (found, size))
                    message = f"{node.target} must have size {size} in dimension {dim}, as the example had"
                self.graph.call_function(torch._assert, (holds_for, message))

    def _assert(self, condition: str) -> None:
        """A guard, as ``torch.export`` writes them (``L['x'].size()[0] <= 2``), as nodes of the graph."""
        try:
            holds_for = as_nodes(self.graph, ast.parse(condition, mode="eval").body, self._inputs)
        except (KeyError, SyntaxError) as error:
            raise TraceError(f"it holds only while {condition}, which cannot be written into the graph") from error
        if isinstance(holds_for, fx.Node):
            self.graph.call_function(torch._assert, (holds_for, f"the graph holds only while {condition}, as for the example"))

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _copy(self, owner: fx.GraphModule, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._stored(owner, str(node.target))
        if node.op == "call_module":
            raise TraceError(f"the exported graph calls the module {node.target!r}, which is not expected here")
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: self.env[n])
        if node.target in _regions():
            return self._inlined(node, args)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise TraceError(f"the forward calls {node.target.name()}, whose branches a graph does not hold")
        result = self._raise(node, args, kwargs)
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, fx.Node) and each.op != "placeholder":
                for key in ("stack_trace", "nn_module_stack"):
                    if key in node.meta:
                        each.meta.setdefault(key, node.meta[key])
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
        """A block under ``no_grad`` or ``autocast``: its nodes, detached where it had no gradients.

        A block that writes works on detached tensors, which share their memory with what it was given: so autograd sees no more
        of it than it saw in the model.
        """
        at = next(k for k, a in enumerate(args) if isinstance(a, fx.GraphModule))
        if isinstance(args[0], str) and args[2]:  # device, dtype, whether it is enabled
            raise TraceError("the forward enables autocast itself, which a graph does not hold")
        if args[0] is True and self._without_gradient:
            raise TraceError("the forward enables gradients within a block that disables them, which a graph does not hold")
        body, given, silent = args[at], args[at + 1 :], args[0] is False
        detached: dict[Any, Any] = {}
        if silent and any(writes_to(inner.target) for inner in body.graph.nodes):
            places = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
            detached = {self._detached(v): v for v, at in zip(given, places, strict=True) if _is_floating(at.meta.get("val"))}
        back = {original: copy for copy, original in detached.items()}
        outer, self.env = self.env, {}
        self._without_gradient += silent
        outputs = self._body(body, iter([back.get(v, v) if isinstance(v, fx.Node) else v for v in given]))
        self._without_gradient -= silent
        self.env = outer
        found = [detached.get(v, v) if isinstance(v, fx.Node) else v for v in outputs]
        own = {v for v in given if isinstance(v, fx.Node)}
        return tuple(self._detached(v) if silent and isinstance(v, fx.Node) and v not in own else v for v in found)

    def _body(self, body: fx.GraphModule, inputs: Iterator[Any]) -> Any:
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                self.env[inner] = next(inputs)
            elif inner.op == "output":
                return map_arg(inner.args[0], lambda n: self.env[n])
            else:
                self.env[inner] = self._copy(body, inner)
        raise AssertionError("a body without an output")

    def _detached(self, value: fx.Node) -> fx.Node:
        return self.graph.call_method("detach", (value,))

    def _raise(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = node.target
        if target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if not isinstance(target, torch._ops.OpOverload):
            return self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        packet = f"{target.namespace}.{target._opname}"
        if packet in _DROPPED:
            return None
        if packet == LEAF:
            return self._kept_call(*args)
        if packet in _SAME or (packet == "aten.detach_" and _is_constant(node.args[0])):
            return args[0]
        if packet == "aten.lift_fresh_copy":  # made anew at each call
            return self.graph.call_method("clone", args) if written_later(node) else args[0]
        if writes_to(target):
            return self._writing(node, args, kwargs)
        return self._plain(node, args, kwargs)

    def _plain(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        packet = f"{target.namespace}.{target._opname}"
        kwargs = self._portable(kwargs)
        if packet == "aten.scaled_dot_product_attention" and kwargs.get("scale") is None:
            kwargs["scale"] = 1 / math.sqrt(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]  # whatever is pruned
        for left_out in target._schema.arguments[len(args) :]:
            if left_out.name == "reduction":  # functions of torch have another default
                kwargs.setdefault("reduction", left_out.default_value)
        special = SPELLED.get(packet)
        if special is not None:
            schema = schema_of(node, args, kwargs)
            made = special(self.graph, args, kwargs, schema)
            if made is not NotImplemented:
                return made
        kind, name, more = python_call(target, args)
        if packet == "aten.view" and kind == "call_method" and target._overloadname == "default":
            name = "reshape"  # of what a kernel of this device gave in one piece, perhaps; ``.contiguous()`` has been dropped
        return self.graph.create_node(kind, name, args, kwargs | more)

    def _writing(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument that a call writes to, whether the result of the call is read or not."""
        last = next(iter(reversed(self.graph.nodes)), None)
        made = self._plain(node, args, kwargs)
        new = next(iter(reversed(self.graph.nodes)))
        if new is not last:
            self._effects.add(new)
        returned = node.target._schema.returns  # type: ignore[union-attr]
        itself = len(returned) == 1 and writes_to(node.target) == (0,) and returned[0].alias_info is not None
        return args[0] if new.target is operator.setitem or (itself and self._without_gradient) else made

    def _kept_call(self, tensors: Any, sizes: Any, number: int) -> tuple[Any, ...]:
        leaf = self._leaves[number]
        args, kwargs = leaf.operands(tensors, sizes)
        if isinstance(leaf.target, str):
            name, module = leaf.target, self.model.get_submodule(leaf.target)
        else:
            name = f"stp_fx_call_{number}"
            module = AutogradCall(leaf.target)
        self.root[name] = module
        call = self.graph.call_module(name, args, kwargs)
        found = leaf.nodes(self.graph, call)
        if self._without_gradient:
            return tuple(self._detached(each) for each in found)
        return found

    def _portable(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without hints that change no number, and on the input's device in place of the one of the export."""
        hints = {k for k in kwargs if k in ("layout", "pin_memory", "non_blocking")}
        if kwargs.get("memory_format") not in _FORMATS:
            hints.add("memory_format")
        kept = {k: v for k, v in kwargs.items() if k not in hints}
        if kept.get("device") is not None and torch.device(kept["device"]) == self._literal_device:
            if self._device is None:
                with self.graph.inserting_after(self._last_input):
                    self._device = self.graph.call_function(getattr, (self._first_tensor, "device"))
            kept["device"] = self._device
        return kept

    def _finish(self, node: fx.Node) -> None:
        values: list[Any] = list(map_arg(node.args[0], lambda n: self.env[n]))  # type: ignore[arg-type]
        output = kept_outputs(pytree.tree_unflatten(values, self._spec))
        values, spec = pytree.tree_flatten(output)
        if is_plain(spec):
            self.graph.output(output)
            return
        self.root[_OUTPUT] = Rebuild(spec)
        self.graph.output(self.graph.call_module(_OUTPUT, tuple(values)))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_constant(value: Any) -> bool:
    """Whether a node of an export is a tensor that the forward's code made, which has no gradient."""
    return isinstance(value, fx.Node) and (value.op == "get_attr" or "lift_fresh" in str(value.target))


def _regions() -> set[Any]:
    from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled

    return {wrap_with_autocast, wrap_with_set_grad_enabled}


def _known(model: nn.Module, target: str) -> Any:
    try:
        value = fetch(model, target)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None
