"""Proxies that know their value on the meta device, so that Python's control flow over shapes resolves while tracing."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import fx
from torch.utils.hooks import RemovableHandle

from stp_fx.errors import TraceError
from stp_fx.ir.in_place import shares_memory
from stp_fx.ir.nested import holds

__all__ = ["AUGMENTED", "REGISTERS", "ValueProxy", "holds_proxy", "user_line"]

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
            if name == "requires_grad" and self.node.op not in ("get_attr", "placeholder") and not _asked_by_torch():
                self.tracer.remark("asks whether a tensor requires a gradient, which the graph takes for a no")
            return getattr(value, name)
        if name == "is_meta":
            return False
        if isinstance(value, Mapping) and name in ("get", "items", "values"):
            return self._get if name == "get" else getattr(self._entries(), name)
        attribute = getattr(value, name)
        if callable(attribute) and not isinstance(attribute, (torch.dtype, torch.device, torch.Tensor)):
            return functools.partial(self._call, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", method, (self, *args), kwargs)

    def _augmented(self, name: str, other: Any) -> Any:
        """``y += other``: of a tensor, it writes to ``y`` and to what is a view of it; of a number it makes another."""
        in_place, plain = AUGMENTED[name]
        if not isinstance(self.value, torch.Tensor):
            return self.tracer.create_proxy("call_function", plain, (self, other), {})
        result = self.tracer.create_proxy("call_method", in_place, (self, other), {}, name=plain.__name__.strip("_"))
        self.tracer.augmented[result.node] = plain
        return result

    def register_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """The graph has none; a note says so."""
        self.tracer.remark(REGISTERS)
        return RemovableHandle({})

    @property
    def data(self) -> Any:
        return self.__getattr__("data")

    @data.setter
    def data(self, value: Any) -> None:
        """Other numbers in the same tensor; in the same memory, too, which whoever holds a view of it could tell."""
        if not (isinstance(value, ValueProxy) and shares_memory(value.value, self.value)):
            self.detach().copy_(value)

    def dim(self) -> int:
        return self.value.dim()

    ndimension = dim

    def is_floating_point(self) -> bool:
        return self.value.is_floating_point()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def keys(self) -> Any:
        return self._entries().keys() if isinstance(self.value, Mapping) else super().keys()

    def _entries(self) -> dict[Any, Any]:
        """A dict of nodes for one that stands in the graph, which holds for dicts with the same keys."""
        keys = tuple(self.value)
        found = self.tracer.create_proxy("call_function", tuple, (self,), {})
        self.tracer.guard((found == keys).node, True, truth=True)
        return {key: self._entry(key) for key in keys}

    def _entry(self, key: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def _get(self, key: Any, default: Any = None) -> Any:
        return self._entry(key) if key in self else default

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Mapping):
            return iter(self._entries())
        count = len(self)
        if isinstance(self.value, torch.Tensor) and self.tracer.batch.multiple(count):
            raise TraceError(f"iterates over the batch, at {user_line()}: the graph holds for the example's batch only")
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (self, k), {}) for k in range(count)])

    def __len__(self) -> int:
        """Of a tensor: a size, for which the graph holds. (Python wants a number.)"""
        value = self.value
        if isinstance(value, torch.Tensor) and value.dim():
            size = self.tracer.create_proxy("call_method", "size", (self, 0), {})
            self.tracer.guard(size.node, len(value), truth=False)
        return len(value)

    def __hash__(self) -> int:
        """Of a number: its own, so that sets and dicts find it, and the graph holds for this number; else the node's."""
        value = self.value
        if not isinstance(value, (bool, int, float)):
            return hash(value) if isinstance(value, (str, torch.dtype, torch.device)) else id(self)
        self.tracer.guard(self.node, value, truth=False, counted=True)
        return hash(value)

    def __eq__(self, other: object) -> Any:
        """A node; but a proxy that was left in a cache of the user's equals nothing once its trace is over."""
        if self.tracer.finished:
            return self is other
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, Mapping):
            return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))
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
        self.tracer.asked.ask(self.node)
        return operator.index(value)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._baked("round()"), digits)

    def __format__(self, spec: str) -> str:
        value = self.value
        return format(value, spec) if isinstance(value, (int, float, str)) else str(value)

    def _number(self, what: str) -> Any:
        value = self.value
        return self._known(what, example=what != "bool()").tolist() if isinstance(value, torch.Tensor) else value

    def _known(self, what: str, example: bool = False) -> torch.Tensor:
        """The numbers of a tensor that are known; one number may be what the example gives."""
        known = self.tracer.known(self.node, example and self.value.numel() == 1)
        if known is None:
            raise TraceError(
                f"{what} of a tensor whose value depends on the data, at {user_line()}: a graph has no branches on data. "
                "Prune a submodule that does not branch, or make the branching module a leaf"
            )
        return known

    def _baked(self, what: str) -> Any:
        """A size that becomes a number of the graph: other inputs must have the same one."""
        value = self._number(what)
        self.tracer.guard(self.node, value, truth=False)
        return value

    def item(self) -> Any:
        return self._number("item()")

    def tolist(self) -> Any:
        return self._number("tolist()")

    def numpy(self, *, force: bool = False) -> Any:
        return self._known("numpy()").numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.value, torch.Tensor):
            return numpy.asarray(self._numbers(), *args[:1], **kwargs)
        return self._known("an array").__array__(*args, **kwargs)

    def _numbers(self) -> Any:
        """The sizes in a list or tuple, for which the graph then holds."""
        if isinstance(self.value, (list, tuple)):
            return [each._numbers() if isinstance(each, ValueProxy) else each for each in self]
        return self._baked("an array")


REGISTERS = "registers a hook on the gradient of a tensor, which the graph does not run"


def _asked_by_torch() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("torch.")


def user_line() -> str:
    """The innermost line of the model's own code, as file:line."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "/stp_fx/ir/" not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def holds_proxy(value: Any) -> bool:
    """Whether any of the values in a nested structure is a node."""
    return holds(fx.Proxy, value)


AUGMENTED: dict[str, tuple[str, Callable[..., Any]]] = {
    "__iadd__": ("add_", operator.add),
    "__isub__": ("sub_", operator.sub),
    "__imul__": ("mul_", operator.mul),
    "__itruediv__": ("div_", operator.truediv),
    "__ifloordiv__": ("floor_divide_", operator.floordiv),
    "__imod__": ("remainder_", operator.mod),
    "__ipow__": ("pow_", operator.pow),
    "__iand__": ("bitwise_and_", operator.and_),
    "__ior__": ("bitwise_or_", operator.or_),
    "__ixor__": ("bitwise_xor_", operator.xor),
}
"""Augmented assignments: the method that writes in place, and the operator that gives the same in a new tensor."""

for _name in AUGMENTED:
    setattr(ValueProxy, _name, functools.partialmethod(ValueProxy._augmented, _name))
