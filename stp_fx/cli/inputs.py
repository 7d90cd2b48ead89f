"""``--input``: example inputs by shape; and literals for ``--factory-arg``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from stp_fx.errors import InputError
from stp_fx.ir.call import Call, restored

__all__ = [
    "InputShape",
    "example_of_call",
    "example_of_shapes",
    "input_shape",
    "key_value",
    "named_ratio",
    "ratio_list",
    "shapes_of",
]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InputShape:
    """One input: its shape and dtype, and its name if it is given by name."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str | None = None

    def __str__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.") + ":"
        return (f"{self.name}=" if self.name else "") + dtype + ",".join(map(str, self.shape))


def input_shape(text: str) -> InputShape:
    """``1,3,224,224``, ``int64:1,128`` or ``mask=bool:1,128``."""
    name, equals, rest = text.rpartition("=")
    dtype, _, numbers = rest.rpartition(":")
    if equals and not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{name!r} in {text!r} is no name of an argument")
    if dtype and dtype not in _DTYPES:
        raise argparse.ArgumentTypeError(f"unknown dtype {dtype!r} in {text!r}; known: {', '.join(_DTYPES)}")
    try:
        shape = tuple(int(part) for part in numbers.replace("x", ",").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 1,3,224,224 or int64:1,128") from None
    if any(size < 1 for size in shape) or (not shape and numbers.strip()):
        raise argparse.ArgumentTypeError(f"sizes in {text!r} must be at least 1")
    return InputShape(shape, _DTYPES[dtype or "float32"], name or None)


def example_of_shapes(inputs: list[InputShape]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Positional and named tensors; zeros, since only shapes and dtypes are read (and integers may be indices)."""
    made = [(each.name, _zeros(each)) for each in inputs]
    return tuple(value for name, value in made if name is None), {name: value for name, value in made if name is not None}


def example_of_call(call: Call) -> tuple[Any, dict[str, Any]]:
    """The arguments that a file has recorded; tensors without recorded numbers are zeros."""
    args, named = (restored(each, torch.device("meta")) for each in (call.args, call.kwargs))
    return _with_numbers(args), _with_numbers(named)


def shapes_of(positional: Any, named: dict[str, Any]) -> list[InputShape]:
    """The tensors of an example."""
    found = [(None, each) for each in tree_leaves(positional)]
    found += [(name, each) for name, value in named.items() for each in tree_leaves(value)]
    return [InputShape(tuple(each.shape), each.dtype, name) for name, each in found if isinstance(each, torch.Tensor)]


def _with_numbers(example: Any) -> Any:
    return tree_map(lambda v: torch.zeros_like(v, device="cpu") if isinstance(v, torch.Tensor) and v.is_meta else v, example)


def _zeros(given: InputShape) -> torch.Tensor:
    try:
        return torch.zeros(given.shape, dtype=given.dtype)
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0][:200]
        raise InputError(f"--input: there is no tensor of {str(given)[:80]}: {first}") from error


def key_value(text: str) -> tuple[str, Any]:
    """``key=literal``; a value that is not a Python literal is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
    except (MemoryError, RecursionError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"the value of {key!r} is no literal that Python can read ({error or 'too deep'})"
        ) from None


def named_ratio(text: str) -> tuple[str, float]:
    """``layer4=0.3``."""
    name, equals, value = text.rpartition("=")
    try:
        if equals and name:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RATIO, like layer4=0.3")


def ratio_list(text: str) -> tuple[float, ...]:
    """``0.25,0.5,0.75``."""
    try:
        ratios = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        ratios = ()
    if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ratios in [0, 1), like 0.25,0.5,0.75")
    return ratios
