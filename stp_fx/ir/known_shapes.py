"""Shapes that an op has given before: a memo of torch's shape functions.

On the meta device torch works out many ops through Python decompositions, of 0.2 (an addition) to 10 ms (bilinear interpolation)
a call. A graph is run for its shapes several times, and most of its calls repeat. The result of a call without side effects
follows from the op, from the shapes, strides and dtypes of its operands and from its other arguments. These are the key of the
memo. Pointwise ops on contiguous operands are looked up without their shapes, since their results have the broadcast one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["known_result"]

_NAMESPACES = ("aten", "torchvision")
"""Of ops registered by others it is not known whether a result follows from the arguments alone."""
_PLAIN = (int, float, bool, str, type(None))
_BY_RANK = (torch.layout, torch.memory_format)
_HASHED = (torch.dtype, torch.device, *_BY_RANK)
_ENTRIES = 1 << 14
_Spec = tuple[Any, ...]


class _Tensor(tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]):
    """The dtype, the shape and the strides of a tensor on the meta device."""

    __slots__ = ()


class _Unknown(Exception):
    """An argument of a kind that is no key."""


def known_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``func`` for tensors on the meta device, as new tensors; NotImplemented leaves the call to torch."""
    if not _is_pure(func) or _get_current_dispatch_mode() is not None:  # a mode below asks to see every call
        return NotImplemented
    tensors: list[torch.Tensor] = []
    try:
        spec = (_spec(args, tensors), _spec(tuple(kwargs.items()), tensors) if kwargs else ())
    except _Unknown:
        return NotImplemented
    if not tensors:
        return NotImplemented
    if torch.Tag.pointwise in func.tags:
        full = None if any(isinstance(each, _BY_RANK) for each in (*args, *kwargs.values())) else _broadcast(tensors)
        if full is not None:
            return _pointwise(func, spec, full)
    outcome = _outcome(func, spec, torch.get_default_dtype())
    return NotImplemented if outcome is None else _built(outcome[0])


@functools.cache
def _is_pure(func: Any) -> bool:
    """Whether the op neither writes to its operands nor gives views of them, and its result does not depend on data."""
    schema = func._schema
    if func.namespace not in _NAMESPACES or schema.is_mutable:
        return False
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return False
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


def _spec(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The part of a key that stands for ``value``; its tensors are appended to ``tensors``."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or not value.is_meta or value.layout is not torch.strided:
            raise _Unknown
        if value.dtype.is_complex or value.is_quantized:
            raise _Unknown
        tensors.append(value)
        return _Tensor((value.dtype, tuple(value.shape), value.stride()))
    kind = type(value)
    if kind in _PLAIN:
        return kind, value  # 1, 1.0 and True are equal, and give different dtypes
    if kind is list or kind is tuple or kind is torch.Size:
        return kind, tuple([_spec(each, tensors) for each in value])
    if kind in _HASHED:
        return value
    raise _Unknown


def _built(spec: Any) -> Any:
    """The value that a specification stands for; tensors are new."""
    if isinstance(spec, _Tensor):
        dtype, shape, stride = spec
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if isinstance(spec, tuple):
        kind, content = spec
        return content if kind in _PLAIN else kind(_built(each) for each in content)
    return spec


@functools.lru_cache(maxsize=_ENTRIES)
def _outcome(func: Any, spec: tuple[_Spec, _Spec], default: torch.dtype) -> tuple[Any] | None:
    """The specification of what ``func`` gives, in a tuple; None if its results are no new tensors on the meta device.

    The default dtype is that of the results of some ops on whole numbers."""
    args, kwargs = spec
    given: list[torch.Tensor] = []
    result = func(*_built(args), **dict(_built(kwargs)) if kwargs else {})
    try:
        found = _spec(result, given)
    except _Unknown:
        return None
    storages = {each.untyped_storage()._cdata for each in given}
    if len(storages) < len(given) or any(each.storage_offset() for each in given):
        return None
    return (found,)


def _broadcast(tensors: list[torch.Tensor]) -> torch.Size | None:
    """The shape that contiguous operands are broadcast to, where one of them has it already; else None."""
    full = max((each.shape for each in tensors), key=len)
    for each in tensors:
        if len(each.shape) == len(full) and each.numel() > full.numel():
            full = each.shape
        if not each.is_contiguous():
            return None
    for each in tensors:
        if each.shape != full and any(
            size not in (1, whole) for size, whole in zip(reversed(each.shape), reversed(full), strict=False)
        ):
            return None
    return full


def _pointwise(func: Any, spec: tuple[_Spec, _Spec], full: torch.Size) -> Any:
    """The result of a pointwise op on contiguous operands, by their dtypes alone."""
    outcome = _outcome(func, (_shapeless(spec[0]), _shapeless(spec[1])), torch.get_default_dtype())
    if outcome is None or not isinstance(outcome[0], _Tensor) or len(outcome[0][1]) != min(len(full), 1):
        return NotImplemented
    return torch.empty(full, dtype=outcome[0][0], device="meta")


def _shapeless(spec: Any) -> Any:
    """The same with one position in place of every shape; tensors without dimensions stay so, since they promote otherwise."""
    if isinstance(spec, _Tensor):
        return _Tensor((spec[0], (1,), (1,))) if spec[1] else spec
    if isinstance(spec, tuple) and len(spec) == 2 and spec[0] in (list, tuple, torch.Size):
        return spec[0], tuple([_shapeless(each) for each in spec[1]])
    return spec
