"""``isinstance``, ``type`` and ``callable`` as a model's forward means them: a node that stands for a tensor is one."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.ir.active import active
from stp_fx.ir.nested import mapped
from stp_fx.ir.proxies import ValueProxy, holds_proxy

__all__ = ["BUILTINS", "as_tensor", "is_tensor", "scripted_isinstance"]

_torch_as_tensor: Any = torch.as_tensor
_torch_jit_isinstance: Any = torch.jit.isinstance


def _is_instance(value: Any, kinds: Any) -> bool:
    """``isinstance`` as a model's forward means it: a node that stands for a tensor is one."""
    if isinstance(value, kinds):
        return True
    if not isinstance(value, ValueProxy):
        return False
    return issubclass(value.tracer.kind_of(value.node), kinds) or isinstance(value.value, kinds)


def is_tensor(value: Any) -> bool:
    """``torch.is_tensor`` for what a forward holds while it is traced."""
    return _is_instance(value, torch.Tensor)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
    """``torch.as_tensor``: of a tensor the same one, of a list of sizes a node that makes one."""
    tracer, named = active(), {k: v for k, v in (("dtype", dtype), ("device", device)) if v is not None}
    if tracer is None or not holds_proxy((data, named)):
        return _torch_as_tensor(data, **named)
    if not is_tensor(data):
        return tracer.create_proxy("call_function", _torch_as_tensor, (data,), named)
    return data.to(**named) if named else data


def scripted_isinstance(obj: Any, target_type: Any) -> bool:
    """``torch.jit.isinstance``, which takes types with arguments such as ``list[Tensor]``."""
    return _torch_jit_isinstance(mapped(ValueProxy, lambda proxy: proxy.value, obj), target_type)


def _is_callable(value: Any) -> bool:
    """``callable`` as a model's forward means it: ``default(x, fallback)`` calls a function and hands a tensor back."""
    return callable(value.value if isinstance(value, ValueProxy) else value)


class _MetaType(type):
    """The type of what stands for ``type``: it is ``type`` to whoever asks."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, kind: Any) -> bool:
        return issubclass(kind, type)

    def __eq__(cls, other: object) -> bool:
        return other is type or other is cls

    def __hash__(cls) -> int:
        return hash(type)


class _Type(type, metaclass=_MetaType):
    """``type`` as a model's forward means it: that of a node is the type of its value."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return type(*args, **kwargs)
        (value,) = args
        kind = value.tracer.kind_of(value.node) if isinstance(value, ValueProxy) else type(value)
        return cls if kind is type else kind


BUILTINS: dict[str, Any] = {"isinstance": _is_instance, "type": _Type, "callable": _is_callable}
"""The names that the globals of a model's forwards get while it is traced."""
