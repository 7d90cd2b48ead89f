"""Whether two results are the same function's: nested values compared up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

__all__ = ["Difference", "compared", "tolerance"]

_SCALE = 1e-2
"""Differences are relative to a tensor's largest value, or to this where that is smaller: it may be what cancellation left."""
_DEEPEST = 8


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest relative difference of all tensors, and the first thing that differs by more than rounding, in words."""

    largest: float = 0.0
    text: str | None = None

    def then(self, other: Difference) -> Difference:
        return Difference(max(self.largest, other.largest), other.text if self.text is None else self.text)


def tolerance(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """The largest rounding error, relative to the largest value of a tensor: 4e-10, 7e-5, 2e-2, 5e-2 for double to bfloat16."""
    tf32 = dtype is torch.float32 and device is not None and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return (2.0**-10 if tf32 else torch.finfo(dtype).eps) ** 0.6


def compared(expected: Any, actual: Any, what: str = "the output", depth: int = 0) -> Difference:
    """How ``actual`` differs from ``expected``. NaN is NaN; what is neither a tensor nor plain is compared by its attributes."""
    if depth > _DEEPEST:
        return Difference()
    if isinstance(expected, torch.Tensor) or isinstance(actual, torch.Tensor):
        return _tensors(expected, actual, what)
    if type(expected) is not type(actual) and not (isinstance(expected, Mapping) and isinstance(actual, Mapping)):
        return Difference(1.0, f"{what} is a {type(actual).__name__} in place of a {type(expected).__name__}")
    theirs, ours = _parts(expected, what), _parts(actual, what)
    if theirs is None or ours is None:
        return _objects(expected, actual, what, depth)
    if list(theirs) != list(ours):
        text = f"{what} has {len(ours)} values in place of {len(theirs)}"
        return Difference(1.0, text if len(ours) != len(theirs) else f"{what} has other names: {', '.join(map(str, ours))[:60]}")
    result = Difference()
    for place, value in theirs.items():
        result = result.then(compared(value, ours[place], place, depth + 1))
    return result


def _parts(value: Any, what: str) -> dict[str, Any] | None:
    """The contents of a container, by how they are reached; None for a leaf."""
    if isinstance(value, Mapping):
        return {f"{what}[{key!r}]": item for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return {f"{what}[{k}]": item for k, item in enumerate(value)}
    leaves = pytree.tree_leaves(value)
    return None if len(leaves) == 1 and leaves[0] is value else {f"{what}[{k}]": item for k, item in enumerate(leaves)}


def _objects(expected: Any, actual: Any, what: str, depth: int) -> Difference:
    if expected is None or isinstance(expected, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)):
        same = expected == actual or (expected != expected and actual != actual)
        if not same and isinstance(expected, float):
            return _tensors(torch.tensor(expected, dtype=torch.float64), torch.tensor(actual, dtype=torch.float64), what)
        return Difference() if same else Difference(1.0, f"{what} is {actual!r:.60} in place of {expected!r:.60}")
    held = [getattr(value, "__dict__", None) for value in (expected, actual)]
    if depth >= _DEEPEST or not held[0] or not held[1]:
        return Difference()  # nothing that can be compared
    return compared(held[0], held[1], what, depth + 1)


def _tensors(expected: Any, actual: Any, what: str) -> Difference:
    if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return Difference(1.0, f"{what} is a {type(actual).__name__} in place of a {type(expected).__name__}")
    for name in ("shape", "dtype"):
        one, other = getattr(expected, name), getattr(actual, name)
        if one != other:
            shown = [tuple(v) if isinstance(v, torch.Size) else v for v in (one, other)]
            return Difference(1.0, f"{what} has {name} {shown[1]} in place of {shown[0]}")
    if expected.layout is not torch.strided or expected.is_meta or expected.is_quantized or expected.is_nested:
        return Difference()
    if expected.is_complex():
        return _tensors(torch.view_as_real(expected.resolve_conj()), torch.view_as_real(actual.resolve_conj()), what)
    if not expected.is_floating_point():
        wrong = int((expected != actual).sum())
        return Difference(1.0, f"{wrong} of {expected.numel()} numbers in {what} differ") if wrong else Difference()
    return _floats(expected.detach(), actual.detach(), what)


def _floats(expected: torch.Tensor, actual: torch.Tensor, what: str) -> Difference:
    if torch.equal(expected, actual) or not expected.numel():
        return Difference()
    allowed = tolerance(expected.dtype, expected.device)
    if expected.device.type != "mps":
        expected, actual = expected.double(), actual.double()
    finite = expected.isfinite() & actual.isfinite()
    alike = (expected == actual) | (expected.isnan() & actual.isnan())
    wrong = int((~(finite | alike)).sum())
    if wrong:
        return Difference(1.0, f"{what}: {wrong} of {expected.numel()} values are NaN or infinite on one side alone")
    expected, actual = expected[finite], actual[finite]
    if not expected.numel():
        return Difference()
    scale = max(float(expected.abs().max()), float(actual.abs().max()), _SCALE)
    largest = float((expected - actual).abs().max()) / scale
    if largest <= allowed:
        return Difference(largest)
    return Difference(largest, f"{what} differs by {largest:.2g} of its largest value")
