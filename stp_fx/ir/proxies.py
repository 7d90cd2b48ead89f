"""Proxies that know their value on the meta device, so that Python's control flow over shapes resolves while tracing."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

from stp_fx.errors import TraceError

__all__ = ["ReplayTracer", "ValueProxy", "factories_take_nodes", "holds_proxy", "user_line"]

_PLAIN = {
    "ndim",
    "is_cuda",
    "is_cpu",
    "is_mps",
    "is_xpu",
    "is_nested",
    "is_sparse",
    "is_quantized",
    "requires_grad",
    "layout",
    "is_leaf",
}
"""Tensor attributes that are answered at once; others (``shape``, ``dtype``, ``device``) are nodes of the graph."""


class ValueProxy(fx.Proxy):
    """A node with its meta value. Sizes stay nodes as arguments and become numbers where Python needs one."""

    tracer: Any  # a ModuleTracer, whose guard() hears of every size that becomes a number

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if isinstance(value, torch.Tensor) and name in _PLAIN:
            return getattr(value, name)
        if name == "is_meta":
            return False
        attribute = getattr(value, name)
        if callable(attribute) and not isinstance(attribute, (torch.dtype, torch.device, torch.Tensor)):
            return functools.partial(self._call, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", method, (self, *args), kwargs)

    def dim(self) -> int:
        return self.value.dim()

    ndimension = dim

    def is_floating_point(self) -> bool:
        return self.value.is_floating_point()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iter__(self) -> Iterator[Any]:
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (self, k), {}) for k in range(len(self))])

    def __len__(self) -> int:
        return len(self.value)

    def __contains__(self, item: Any) -> bool:
        return any(bool(each == item) for each in self)

    def __bool__(self) -> bool:
        value = bool(self._number("bool()"))
        self.tracer.guard(self.node, value, truth=True)
        return value

    def __int__(self) -> int:
        return int(self._baked("int()"))

    def __float__(self) -> float:
        return float(self._baked("float()"))

    def __index__(self) -> int:
        value = self._number("an index")
        self.tracer.guard(self.node, value, truth=False, counted=True)
        return operator.index(value)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._baked("round()"), digits)

    def __format__(self, spec: str) -> str:
        value = self.value
        return format(value, spec) if isinstance(value, (int, float, str)) else str(value)

    def _number(self, what: str) -> Any:
        value = self.value
        if isinstance(value, torch.Tensor):
            raise TraceError(
                f"{what} of a tensor whose value depends on the data, at {user_line()}: a graph has no branches on data. "
                "Prune a submodule that does not branch, or make the branching module a leaf"
            )
        return value

    def _baked(self, what: str) -> Any:
        """A size that becomes a number of the graph: other inputs must have the same one."""
        value = self._number(what)
        self.tracer.guard(self.node, value, truth=False)
        return value

    def item(self) -> Any:
        return self._number("item()")

    def tolist(self) -> Any:
        return self._number("tolist()")


def user_line() -> str:
    """The innermost line of the model's own code, as file:line."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "/stp_fx/ir/" not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


_FACTORIES = (
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "rand",
    "randn",
    "linspace",
    "eye",
    "tensor",
    "randperm",
    "randint",
    "finfo",
    "iinfo",
)
"""These take no tensor, so nodes among their sizes and dtypes do not reach ``__torch_function__``; while tracing they are
patched."""

_SHAPED = ("expand", "repeat", "view", "reshape", "new_zeros", "new_ones", "new_full", "new_empty", "tile", "narrow")
"""Methods of a tensor that the model's own code made; nodes among their sizes do not reach it either."""


@contextmanager
def factories_take_nodes(tracer: fx.Tracer) -> Iterator[None]:
    """``torch.zeros(b, n)`` and ``made_here.expand(b, n)`` with nodes as sizes become nodes."""
    with ExitStack() as undo:
        for name in _FACTORIES:
            original = getattr(torch, name)
            setattr(torch, name, _taking_nodes(tracer, original, "call_function", original))
            undo.callback(setattr, torch, name, original)
        for name in _SHAPED:  # inherited, so that deleting restores them
            setattr(torch.Tensor, name, _taking_nodes(tracer, getattr(torch.Tensor, name), "call_method", name))
            undo.callback(delattr, torch.Tensor, name)
        yield


def _taking_nodes(tracer: fx.Tracer, original: Any, kind: str, target: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if holds_proxy((args, kwargs)):
            return tracer.create_proxy(kind, target, args, kwargs)
        return original(*args, **kwargs)

    return call


def holds_proxy(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(holds_proxy(v) for v in value)
    return any(holds_proxy(v) for v in value.values()) if isinstance(value, dict) else isinstance(value, fx.Proxy)


class _Settable(fx.Proxy):
    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class ReplayTracer(fx.Tracer):
    """Reads a pickled graph's own code back; knows what plain fx does not: writing into a slice, sizes that are nodes.

    Buffers and constants are read through the graph, since what is done to them may depend on sizes.
    """

    proxy_buffer_attributes = True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor) and self.root.__dict__.get(attr) is attr_val:
            if attr not in parameter_proxy_cache:
                parameter_proxy_cache[attr] = self.create_proxy("get_attr", attr, (), {})
            return parameter_proxy_cache[attr]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Settable(node, self)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with factories_take_nodes(self):
            return super().trace(root, concrete_args)
