"""Which ops keep zeros: a position whose operands read zero gives zero.

A mask makes the operands of a graph node zero. Where a node makes several ATen calls, a sum inside it may read a value that
is not zero where the operands are: ``exp(x).sum()``. Masked and removed then differ. The analysis follows zeros from call to
call with :func:`keeps_zeros`; an op that is not listed here or in its entry is taken to lose them.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

from stp_fx.rules.call import OpCall
from stp_fx.rules.pointwise import is_pointwise
from stp_fx.rules.registry import Entry

__all__ = ["keeps_zeros"]

# fmt: off
_OF_ONE = frozenset((
    "abs", "asin", "asinh", "atan", "atanh", "celu", "ceil", "elu", "erf", "expm1", "fix", "floor", "gelu",
    "hardshrink", "hardswish", "leaky_relu", "log1p", "mish", "neg", "positive", "relu", "relu6", "round", "selu",
    "sgn", "sign", "silu", "sin", "sinh", "softshrink", "sqrt", "square", "tan", "tanh",
    "trunc",
))
# fmt: on
"""Pointwise functions of one operand with f(0) = 0."""


def keeps_zeros(call: OpCall, entry: Entry | None, zero: Container[int]) -> bool:
    """Whether the results are zero where a mask makes the operands with ids in ``zero`` zero; ``entry`` is the op's."""
    values = [t for t in call.operands if t.is_floating_point() or t.is_complex()]
    if entry is not None:
        return entry.keeps_zero and bool(values) and all(id(t) in zero for t in values)
    return is_pointwise(call.func) and bool(call.outs) and _pointwise(call, values, zero)


def _pointwise(call: OpCall, values: list[torch.Tensor], zero: Container[int]) -> bool:
    name, shape = call.name.rstrip("_"), call.outs[0].shape
    first = call.args[0] if call.args else None
    full = [t for t in values if id(t) in zero and t.shape == shape]
    if name in _OF_ONE:
        return id(first) in zero
    if name == "mul":
        return bool(full) or (bool(values) and all(id(t) in zero for t in values))
    if name == "div":
        return len(full) == 1 and first is full[0]  # 0 / 0 is no zero
    if name == "pow":
        exponent = call.get("exponent")
        return id(first) in zero and isinstance(exponent, (int, float)) and exponent > 0
    if name in ("add", "sub"):
        return len(full) == len(values) and _no_number(call.get("other"))
    return False


def _no_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or value == 0
