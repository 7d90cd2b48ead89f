"""``isinstance``, ``type`` and ``callable`` as a model's forward means them: a node that stands for a tensor is one."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.ir.proxies import ValueProxy

__all__ = ["BUILTINS", "is_tensor"]


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
"""What the globals of a model's forwards get while it is traced."""
