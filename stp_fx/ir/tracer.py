"""The first front end: symbolic tracing that keeps modules and their names, with a meta value at every node."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.utils.checkpoint import CheckpointFunction

from stp_fx.errors import TraceError
from stp_fx.ir._torch_compat import SAVES_FOR_CHECKPOINT
from stp_fx.ir.assignments import with_assignments
from stp_fx.ir.base_tracer import ReplayTracer, autocasts, hidden_functions, is_switchable, takes_weights
from stp_fx.ir.branches import selected
from stp_fx.ir.cache_keys import drop_cache_guards
from stp_fx.ir.constant_inputs import assert_constants
from stp_fx.ir.guarding import LEAF, OWN, GuardingTracer
from stp_fx.ir.in_place import relax
from stp_fx.ir.kept import containers_kept
from stp_fx.ir.known_values import evaluated
from stp_fx.ir.lowering import lowering_of, outside_of_tree
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.nested import own_containers
from stp_fx.ir.outputs import Rebuild, is_plain, kept_outputs
from stp_fx.ir.patches import active, suspended
from stp_fx.ir.proxies import ValueProxy, user_line
from stp_fx.ir.random_ops import frozen_draws, is_random
from stp_fx.ir.reach import reached_scopes
from stp_fx.ir.root_hooks import with_hooks
from stp_fx.ir.runner import call, operands
from stp_fx.ir.shapes import fetch, meta_like, meta_twin
from stp_fx.ir.stored_reads import StoredReads
from stp_fx.ir.train_eval import AutogradCall

__all__ = ["ModuleTracer"]


class ModuleTracer(GuardingTracer):
    """Traces ``root`` with the given meta values; see :func:`stp_fx.trace`."""

    def __init__(
        self,
        root: nn.Module,
        values: Mapping[str, Any],
        constants: Mapping[str, Any],
        by_name: Collection[str] = (),
        taken: Mapping[str, bool] | None = None,
        batch: int = 0,
    ) -> None:
        super().__init__(batch)
        self._values, self._constants, self._by_name, self._taken = values, constants, by_name, taken or {}
        memo: dict[int, Any] = {}
        self._twin = meta_twin(root, memo)
        self._twins = dict(self._twin.named_modules(remove_duplicate=False))
        self._metas: dict[int, torch.Tensor] = {}
        buffers = list(root.named_buffers(remove_duplicate=False))
        named = [*root.named_parameters(remove_duplicate=False), *buffers]
        self._names: dict[int, str] = {}
        for name, tensor in named:
            self._names.setdefault(id(tensor), name)
        self._stored: dict[str, fx.Proxy] = {}
        self._gradients = torch.is_grad_enabled()
        self._autocasts = autocasts()
        self._mode = MetaRun()
        self._hidden = hidden_functions()
        self.called: dict[int, nn.Module] = {}
        self.augmented: dict[fx.Node, Callable[..., Any]] = {}
        self.buffer_metas = {name: self._meta(tensor) for name, tensor in buffers}
        self.root = root  # fx sets it too, but only once it traces

    # -- calls that are kept as nodes -------------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Unflatten) or lowering_of(m) is not None:
            return False  # its sizes have to be literals of the graph, or its lowering is traced
        return super().is_leaf_module(m, module_qualified_name) or is_random(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lower = lowering_of(m)
        forward = forward if lower is None else functools.partial(lower, m)
        if m not in (self.submodule_paths or {}):
            return outside_of_tree(m, forward)(*args, **kwargs)
        self.called.setdefault(id(m), m)
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        if kind == "call_function" and target in self._hidden and takes_weights(args, kwargs):
            return target(*args, **kwargs)
        if autocasts() - self._autocasts:
            raise TraceError(
                f"the forward enables autocast itself (at {user_line()}), which a graph does not hold: take the block out of it, "
                "and put the call of the whole model under autocast"
            )
        if kind == "call_method" and str(target).endswith("_") and not str(target).endswith("__"):
            args = (self._written_to(args[0]), *args[1:])
        self.asked.settle(args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if "val" not in proxy.node.meta:
            self.selects |= bool(selected(proxy.node))
            known = functools.partial(self.known, example=True)
            proxy.node.meta["val"] = evaluated(proxy.node, self._evaluate, known, self.selects)
        if proxy.node.meta["val"] is None and kind != "output":
            if target is operator.getitem:
                self._assert(self.create_proxy("call_function", operator.is_, (proxy, None), {}))
            return None  # code asks `is None`, which no proxy could answer
        return self._without_gradient(proxy) if kind != "get_attr" else proxy

    def _written_to(self, target: Any) -> Any:
        """The tensor that a method writes to; under ``torch.no_grad`` a parameter without gradient, which allows no writing."""
        stored = isinstance(target, fx.Proxy) and target.node.op == "get_attr" and self._gradients
        return target.detach() if stored and not torch.is_grad_enabled() else target

    def _without_gradient(self, proxy: fx.Proxy) -> fx.Proxy:
        """A value computed under ``torch.no_grad`` has no gradient in the graph either, which has no such blocks."""
        value = proxy.node.meta["val"]
        if torch.is_grad_enabled() or not self._gradients or not isinstance(value, torch.Tensor):
            return proxy
        if proxy.node.op in ("placeholder", "output") or not value.is_floating_point():
            return proxy
        detached = super().create_proxy("call_method", "detach", (proxy,), {})
        detached.node.meta["val"] = value
        return detached

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not isinstance(attr_val, torch.Tensor) or isinstance(attr_val, fx.Proxy):
            return attr_val
        name = self._names.get(id(attr_val))
        return attr_val if name is None else self.stored_proxy(name)

    def stored_proxy(self, name: str) -> fx.Proxy:
        if name not in self._stored:
            self._stored[name] = self.create_proxy("get_attr", name, (), {})
        return self._stored[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor) and id(a) in self._names:
            return self.stored_proxy(self._names[id(a)]).node
        if isinstance(a, numpy.ndarray):
            todo = f"{frozen_draws(self.draws)[0]}: draw them with torch" if self.draws else "give it torch.from_numpy of it"
            raise TraceError(f"takes a numpy array beside traced tensors, at {user_line()}: {todo}")
        made = super().create_arg(a)
        if isinstance(made, fx.Node) and "val" not in made.meta:
            made.meta["val"] = self._evaluate(made)
        return made

    # -- values ----------------------------------------------------------------------------------------------------

    def _evaluate(self, node: fx.Node) -> Any:
        """Runs one node on meta tensors."""
        if node.op == "get_attr":
            with suspended():
                return self._meta(fetch(self.root, str(node.target)))
        args, kwargs = operands(node, lambda n: n.meta["val"])
        if node.op == "call_function" and node.target is getattr and args[1] == "device":
            return self._device()
        with suspended(), torch.no_grad(), self._mode:
            return call(node, args, kwargs, lambda target: self._twins[target].forward)

    def _meta(self, tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if id(tensor) not in self._metas:
            self._metas[id(tensor)] = meta_like(tensor)
        return self._metas[id(tensor)]

    def _device(self) -> torch.device:
        return next((p.device for p in self.root.parameters()), torch.device("cpu"))  # type: ignore[union-attr]

    def kind_of(self, node: fx.Node) -> type:
        """The type of a node's value; of a stored tensor, that which the model has."""
        with suspended():
            return type(fetch(self.root, str(node.target)) if node.op == "get_attr" else node.meta["val"])

    # -- inputs ----------------------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        """Placeholders for the given tensors, in the order of the signature; everything else is a constant.

        Arguments given by name are passed by name, since hooks see the difference.
        """
        positional: list[Any] = []
        named: dict[str, Any] = {}
        spread: list[str] = []
        own = self.root.__dict__.get("forward")  # put on the instance, in place of its class's
        parameters = list(inspect.signature(own or root_fn).parameters.values())[0 if own else 1 :]
        for parameter in parameters:
            if parameter.kind is parameter.VAR_POSITIONAL:
                spread = [k for k in (*self._values, *self._constants) if k.startswith(f"{parameter.name}_")]
                positional.extend(self._argument(k) for k in sorted(spread, key=lambda k: int(k.rpartition("_")[2])))
            elif parameter.kind is parameter.VAR_KEYWORD:
                known = {*(each.name for each in parameters), *spread}
                named.update(
                    {k: self._argument(k) for k in (*self._values, *self._constants) if k not in known and k not in named}
                )
            elif parameter.name in self._values or parameter.name in self._constants:
                if parameter.kind is parameter.KEYWORD_ONLY or parameter.name in self._by_name:
                    named[parameter.name] = self._argument(parameter.name)
                else:
                    positional.append(self._argument(parameter.name))

        places = {str(n.target): n for n in self.graph.nodes if n.target in self._taken}
        for node in assert_constants(self.graph, places, self._constants):
            node.meta["val"] = self._evaluate(node)

        def call(root: nn.Module, *args: Any) -> Any:
            forward = functools.partial(root_fn, root) if own is None else own
            result = self._returned(with_assignments(self, with_hooks(root, forward, args, named)))
            self.asked.settle()
            return result

        return call, [self.root, *positional]

    def _argument(self, name: str) -> Any:
        if name in self._constants:
            if name in self._taken:
                default = (self._constants[name],) if self._taken[name] else ()
                self.create_node("placeholder", name, default, {}).meta["val"] = self._constants[name]
            return self._constants[name]
        node = self.create_node("placeholder", name, (), {})
        node.meta["val"] = own_containers(self._values[name])
        return self.proxy(node)

    # -- what the forward writes to the model ----------------------------------------------------------------------

    def _stored_reads(self) -> StoredReads:
        def write(tensor: torch.Tensor, value: Any) -> None:
            setattr(self.stored_proxy(self._names[id(tensor)]), "data", value)  # noqa: B010 - of a ValueProxy

        return StoredReads(
            self._names, lambda: active() is self, lambda tensor: self.stored_proxy(self._names[id(tensor)]), write
        )

    def _returned(self, result: Any) -> Any:
        """Classes that fx does not know, but that pytree can take apart, are put together at the end of the graph."""
        result = kept_outputs(result)
        leaves, spec = pytree.tree_flatten(result, is_leaf=lambda v: isinstance(v, tuple) and hasattr(v, "_fields"))
        if is_plain(spec) or any(dataclasses.is_dataclass(leaf) for leaf in leaves):
            return result
        return self.create_proxy("call_module", self.leaf(Rebuild(spec)), tuple(leaves), {})

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        before = set(root.__dict__) | set(root._buffers) | set(root._parameters) | set(root._modules)
        try:
            with containers_kept(root, self.assigned, OWN) as held, self._stored_reads():
                graph = super().trace(root, concrete_args)
                drop_cache_guards(graph, held.replaced())
        except BaseException:
            self.forget_constants(before)
            raise
        finally:
            self.finished = True
        self.draws.update(held.drawn)
        self.assigned[:] = [name for name in self.assigned if name not in self.written]
        self._before = before
        relax(graph, self.augmented)
        graph._tracer_cls = ReplayTracer
        return graph

    def scopes(self, root: nn.Module) -> Iterable[dict[str, Any]]:
        return reached_scopes(root)

    def keeps_call(self, function: Any) -> bool:
        """Functions that ask whether they train stay calls, and those that are not Python's; others are traced through."""
        return not isinstance(function, types.FunctionType) or is_switchable(function)

    def apply_function(self, function: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function with a backward of its own must not be traced through: its gradient would be lost.

        That of a checkpoint is the one that its function has anyway.
        """
        if function is CheckpointFunction:
            return args[0](*args[2:])  # the function, and whether random states are kept
        if function is SAVES_FOR_CHECKPOINT:
            return function.forward(*args)
        return self.create_proxy("call_module", self.leaf(AutogradCall(function)), args, kwargs)

    def leaf(self, module: nn.Module) -> str:
        """Puts a module of our own beside the model's, for the graph to call; it is taken back with the constants."""
        name = f"{LEAF}{sum(k.startswith(LEAF) for k in self.root._modules)}"  # type: ignore[union-attr]
        module.training = vars(self.root)["training"]  # so that it does not count as the model's own question
        self.root._modules[name] = self._twins[name] = module  # type: ignore[union-attr]
        return name

    def lifted(self) -> list[Any]:
        """Tensors that the model's code made while it was traced, now constants of the graph."""
        return [getattr(self.root, k) for k in self._lifted_names(self._before) if not k.startswith(LEAF)]

    def _stores(self) -> tuple[dict[str, Any], ...]:
        return self.root.__dict__, self.root._buffers, self.root._modules  # type: ignore[union-attr]

    def _lifted_names(self, before: set[str]) -> list[str]:
        return [k for store in self._stores() for k in store if k not in before and k.startswith(OWN)]

    def forget_constants(self, before: set[str] | None = None) -> None:
        """Takes back the attributes under which constants were stored on the module that was traced."""
        names = set(self._lifted_names(self._before if before is None else before))
        self._forgotten = [(store, name, store.pop(name)) for store in self._stores() for name in names.intersection(store)]

    def remember_constants(self) -> None:
        """Puts back what was taken back last, for the graph to be made."""
        for store, name, value in self._forgotten:
            store[name] = value
