"""How a graph was captured, as plain data: enough to capture the same module once more, in another process.

Tensors are described by dtype and shape (``{"tensor": ["float32", [1, 3, 32, 32]]}``), those of whole numbers that the forward
read by their numbers too (``{"tensor": ["int64", [2], [24, 19]]}``), containers by their kind; numbers,
strings, flags and ``None`` stand for themselves. Nothing else can be described: such a call is recorded without its example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stp_fx.errors import InputError

__all__ = ["Call", "call_of", "described", "restored"]

_DEPTH = 32
"""The deepest nesting of an example that is described or read."""
_LARGEST_EXAMPLE = 1 << 30
"""Elements; a hostile description must not ask for more memory than there is."""
_MOST_NUMBERS = 4096
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_SEQUENCES = {"list": list, "tuple": tuple}


@dataclasses.dataclass(frozen=True)
class Call:
    """``stp_fx.trace(model, args, kwargs=kwargs, frontend=frontend)``, with the modes that the model was in.

    ``args`` and ``kwargs`` are descriptions (:func:`described`), both None where the example cannot be described; ``other``
    names the modules whose train/eval flag was not the root's, ``training``; ``outputs`` are those asked for, if not all.
    """

    frontend: str
    args: Any
    kwargs: Any
    training: bool
    other: tuple[str, ...] = ()
    outputs: tuple[str | int, ...] = ()

    def following(self, before: torch.dtype | None, now: torch.dtype | None) -> Call:
        """The call for parameters of dtype ``now``: tensors that had the parameters' dtype, ``before``, have it again."""
        if before is None or now is None or before == now or self.args is None:
            return self
        return dataclasses.replace(self, args=_cast(self.args, before, now), kwargs=_cast(self.kwargs, before, now))


def call_of(model: nn.Module, args: Any, kwargs: Mapping[str, Any], frontend: str, numbers: bool = False) -> Call:
    """The record of a capture; with the whole numbers of the example where the forward read them (``numbers``)."""
    positional = () if args is None else tuple(args) if isinstance(args, (tuple, list)) else (args,)
    other = tuple(name for name, module in model.named_modules() if module.training != model.training)
    try:
        return Call(frontend, described(positional, numbers), described(dict(kwargs), numbers), model.training, other)
    except InputError:
        return Call(frontend, None, None, model.training, other)


def described(value: Any, numbers: bool = False, depth: int = 0) -> Any:
    """``value`` as JSON can hold it.

    Raises:
        InputError: an object that has no description.
    """
    if isinstance(value, torch.Tensor) and depth < _DEPTH:
        read = [value.flatten().tolist()] if numbers and _is_short(value) else []
        return {"tensor": [str(value.dtype).removeprefix("torch."), [int(size) for size in value.shape], *read]}
    if type(value) in (list, tuple) and depth < _DEPTH:
        return {type(value).__name__: [described(item, numbers, depth + 1) for item in value]}
    if type(value) is dict and depth < _DEPTH and all(type(key) is str for key in value):
        return {"dict": {key: described(item, numbers, depth + 1) for key, item in value.items()}}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise InputError(f"a {type(value).__name__} cannot be described as plain data")


def _is_short(tensor: torch.Tensor) -> bool:
    """Whole numbers, few enough to be written down."""
    return tensor.dtype in (torch.int64, torch.int32) and not tensor.is_meta and tensor.numel() <= _MOST_NUMBERS


def restored(data: Any, device: torch.device, depth: int = 0) -> Any:
    """The arguments that :func:`described` described, their tensors uninitialised on ``device``, those with numbers on the CPU.

    Raises:
        InputError: no such description, or one of an unreasonable size.
    """
    if not isinstance(data, dict):
        if data is None or type(data) in (bool, int, float, str):
            return data
        raise InputError(f"an example holds a bare {type(data).__name__}")
    if len(data) != 1 or depth > _DEPTH:
        raise InputError("an example is described by one kind, and nested no deeper than " + str(_DEPTH))
    ((kind, content),) = data.items()
    if kind == "tensor":
        return _tensor(content, device)
    if kind == "dict" and isinstance(content, dict):
        return {key: restored(item, device, depth + 1) for key, item in content.items()}
    if kind in _SEQUENCES and isinstance(content, list):
        return _SEQUENCES[kind](restored(item, device, depth + 1) for item in content)
    raise InputError(f"an example holds {str(kind)[:40]!r}, which describes nothing; known: tensor, list, tuple, dict")


def _cast(data: Any, before: torch.dtype, now: torch.dtype, depth: int = 0) -> Any:
    """A description in which tensors of one dtype have another; what describes nothing is left for :func:`restored`."""
    if not isinstance(data, dict) or depth > _DEPTH:
        return data
    tensor, old = data.get("tensor"), str(before).removeprefix("torch.")
    if isinstance(tensor, list) and tensor and tensor[0] == old:
        return {**data, "tensor": [str(now).removeprefix("torch."), *tensor[1:]]}
    return {kind: _cast_items(content, before, now, depth + 1) for kind, content in data.items()}


def _cast_items(content: Any, before: torch.dtype, now: torch.dtype, depth: int) -> Any:
    if isinstance(content, list):
        return [_cast(item, before, now, depth) for item in content]
    if isinstance(content, dict):
        return {key: _cast(item, before, now, depth) for key, item in content.items()}
    return content


def _tensor(content: Any, device: torch.device) -> torch.Tensor:
    if not (isinstance(content, list) and len(content) in (2, 3) and isinstance(content[0], str) and content[0] in _DTYPES):
        raise InputError(f"a tensor is described by [dtype, sizes]; got {str(content)[:80]}")
    sizes = content[1]
    if not (isinstance(sizes, list) and len(sizes) <= 64 and all(type(size) is int and size >= 0 for size in sizes)):
        raise InputError(f"sizes are integers of at least 0; got {str(sizes)[:80]}")
    if math.prod(max(size, 1) for size in sizes) > _LARGEST_EXAMPLE:
        raise InputError(f"an example of {str(sizes)[:80]} is larger than {_LARGEST_EXAMPLE} elements")
    if len(content) == 3:
        return _with_numbers(content[2], sizes, _DTYPES[content[0]])
    return torch.empty(sizes, dtype=_DTYPES[content[0]], device=device)


def _with_numbers(numbers: Any, sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
    whole = isinstance(numbers, list) and len(numbers) <= _MOST_NUMBERS and all(type(n) is int for n in numbers)
    if not whole or len(numbers) != math.prod(sizes) or dtype not in (torch.int64, torch.int32):
        raise InputError(f"numbers of a tensor of {sizes} are as many integers; got {str(numbers)[:80]}")
    return torch.tensor(numbers, dtype=dtype).reshape(sizes)
