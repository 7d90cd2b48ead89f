"""Parameters and buffers that traced code reaches without an attribute: ``self.parameters()``, a dict, ``.data = ...``.

Attributes of modules give proxies while a model is traced. A read by another way gives the tensor itself, and an op on it alone
would be computed there and then: the graph would hold its result as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

__all__ = ["StoredReads"]

_PARTS = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "shape"})
"""Attributes of a tensor that depend on its values or sizes; others (device, dtype, grad) are read as they are."""
_QUERIES = frozenset(
    {
        *("dim", "ndimension", "stride", "element_size", "data_ptr", "storage_offset", "untyped_storage", "get_device", "type"),
        *("requires_grad_", "has_names", "__len__", "__repr__", "__format__", "__hash__", "__reduce_ex__", "__deepcopy__"),
    }
)


class StoredReads(TorchFunctionMode):
    """Ops on tensors that the model stores become nodes that read them.

    Args:
        names: ids of stored tensors.
        now: whether this thread is tracing; values are computed meanwhile as well.
        proxy: makes the node that reads a stored tensor.
        write: makes the node that writes a value into a stored tensor.
    """

    def __init__(
        self, names: Container[int], now: Callable[[], bool], proxy: Callable[[Any], Any], write: Callable[[Any, Any], None]
    ) -> None:
        super().__init__()
        self._names, self._now, self._proxy, self._write = names, now, proxy, write

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._now() or not self._reads(args, kwargs):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "__set__" and attribute == "data" and id(args[0]) in self._names:
                return self._write(args[0], self._replaced(args[1]))
            if name == "__get__" and attribute in _PARTS:
                return getattr(self._proxy(args[0]), attribute)
            return func(*args, **kwargs)
        if name in _QUERIES or name.startswith(("is_", "register_")):
            return func(*args, **kwargs)
        if name == "__iter__":
            return iter(self._proxy(args[0]))
        given, named = tuple(map(self._replaced, args)), {key: self._replaced(value) for key, value in kwargs.items()}
        if name.startswith("__") and isinstance(given[0], fx.Proxy):
            return getattr(given[0], name)(*given[1:], **named)  # an operator
        return fx.Proxy.__torch_function__(func, types, given, named)

    def _reads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        values = [*args, *kwargs.values()]
        return any(id(each) in self._names for v in values for each in (v if isinstance(v, (list, tuple)) else (v,)))

    def _replaced(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced, value))
        stored = isinstance(value, torch.Tensor) and id(value) in self._names
        return self._proxy(value) if stored else value
