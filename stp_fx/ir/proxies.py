"""Proxies that know their value on the meta device, so that Python's control flow over shapes resolves while tracing."""

from __future__ import annotations

import functools
import operator
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from stp_fx.errors import TraceError

__all__ = ["ReplayTracer", "ValueProxy"]

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

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    @property
    def __class__(self) -> type:  # type: ignore[override]
        # ``isinstance(x, torch.Tensor)`` in a model's forward must see a tensor; ``type(x)`` still says what this is.
        value = self.node.meta.get("val")
        return torch.Tensor if isinstance(value, torch.Tensor) else type(self)

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
        return bool(self._number("bool()"))

    def __int__(self) -> int:
        return int(self._number("int()"))

    def __float__(self) -> float:
        return float(self._number("float()"))

    def __index__(self) -> int:
        return operator.index(self._number("an index"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._number("round()"), digits)

    def __format__(self, spec: str) -> str:
        value = self.value
        return format(value, spec) if isinstance(value, (int, float, str)) else str(value)

    def _number(self, what: str) -> Any:
        value = self.value
        if isinstance(value, torch.Tensor):
            raise TraceError(
                f"{what} of a tensor whose value depends on the data, at {_user_line()}: a graph has no branches on data. "
                "Prune a submodule that does not branch, or make the branching module a leaf"
            )
        return value

    def item(self) -> Any:
        return self._number("item()")

    def tolist(self) -> Any:
        return self._number("tolist()")


def _user_line() -> str:
    """The innermost line of the model's own code."""
    inside = ("/torch/", "/stp_fx/ir/")
    for frame in reversed(traceback.extract_stack()):
        if not any(part in frame.filename for part in inside):
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    return "an unknown line"


class _Settable(fx.Proxy):
    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class ReplayTracer(fx.Tracer):
    """Reads a pickled graph's own code back; knows what plain fx does not, writing into a slice."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Settable(node, self)
