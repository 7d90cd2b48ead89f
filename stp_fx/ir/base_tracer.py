"""The common base of both tracers of the library: ``fx.Tracer`` whose patches are seen by its own thread only."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx._lazy_graph_module import _LazyGraphModule

from stp_fx.ir._torch_compat import STORED_CONSTANTS
from stp_fx.ir.patches import tracing

__all__ = ["BaseTracer", "ReplayTracer", "autocasts", "hidden_functions", "is_switchable", "takes_weights"]


class BaseTracer(fx.Tracer):
    """Traces as ``fx.Tracer`` does; that one patches ``nn.Module`` for the whole process, and forgets to once threads meet."""

    asks_mode = False

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """The graph of ``root.forward``."""
        self.draws: set[str] = set()
        with tracing(self, self.scopes(root)):
            return self._traced(root, concrete_args)

    def scopes(self, root: nn.Module) -> Iterable[dict[str, Any]]:
        """The globals of the code that is traced."""
        yield type(root).forward.__globals__  # type: ignore[attr-defined]

    def keeps_call(self, function: Any) -> bool:
        """Whether a function given to ``fx.wrap`` is to be a node."""
        return True

    def apply_function(self, function: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``function.apply(*args, **kwargs)`` of a custom autograd function, some of whose arguments are proxies."""
        return apply(*args, **kwargs)

    def _traced(self, root: Any, concrete_args: Any) -> fx.Graph:
        _LazyGraphModule.force_recompile(root)
        forward = getattr(type(root), self.traced_func_name)
        self.root, self.root_module_name = root, root._get_name()
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.graph = fx.Graph(tracer_cls=type(self))
        code = getattr(forward, "__code__", None)
        if code is not None:
            fields = {"co_name": code.co_name, "co_filename": code.co_filename, "co_firstlineno": code.co_firstlineno}
            self.graph._co_fields = fields
        self.tensor_attrs = {
            value: f"{name}.{key}" if name else key
            for name, module in root.named_modules(remove_duplicate=False)
            for key, value in vars(module).items()
            if isinstance(value, STORED_CONSTANTS)
        }
        call, args = self.create_args_for_root(forward, True, concrete_args)
        returns = inspect.get_annotations(inspect.unwrap(forward)).get("return")
        self.create_node("output", "output", (self.create_arg(call(*args)),), {}, type_expr=returns)
        self.submodule_paths = None
        return self.graph


class _Settable(fx.Proxy):
    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class ReplayTracer(BaseTracer):
    """Reads a pickled graph's own code back; knows what plain fx does not: writing into a slice, sizes that are nodes.

    Buffers and constants are read through the graph, since what is done to them may depend on sizes.
    """

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return attr_val
        if name not in self._read:
            self._read[name] = self.create_proxy("get_attr", name, (), {})
        return self._read[name]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Settable(node, self)

    def _traced(self, root: Any, concrete_args: Any) -> fx.Graph:
        self._read: dict[str, fx.Proxy] = {}
        self._names = {id(tensor): name for name, tensor in (*root.named_parameters(), *root.named_buffers())}
        return super()._traced(root, concrete_args)


def autocasts() -> set[str]:
    """Types of devices whose calls are cast now."""
    return {device for device in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(device)}


def hidden_functions() -> set[Any]:
    """Python functions that were hidden with ``fx.wrap``."""
    found = (scope.get(name) for (_, name), scope in list(_symbolic_trace._wrapped_fns_to_patch.items()))
    return {function for function in found if isinstance(function, types.FunctionType)}


@functools.lru_cache(maxsize=256)
def is_switchable(function: Any) -> bool:
    return "training" in inspect.signature(function).parameters


def takes_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A function of weights has structure to find; one that only asks whether it trains (stochastic depth) stays a node."""
    return any(isinstance(a, fx.Proxy) and a.node.op == "get_attr" for a in (*args, *kwargs.values()))
