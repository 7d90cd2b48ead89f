"""Values that training and evaluation take from different nodes."""

from __future__ import annotations

from typing import Any

from stp_fx.ir.nested import tensors_within
from stp_fx.rules import Context

__all__ = ["choose"]


def choose(context: Context, trained: Any, evaluated: Any) -> Any:
    """The value of a choice, in evaluation. Tensors of one shape are the same channels in both modes; others are kept whole."""
    values = [tensors_within(each) for each in (trained, evaluated)]
    alike = [tuple(tensor.shape for tensor in each) for each in values]
    if alike[0] == alike[1]:
        for one, two in zip(*values, strict=True):
            dims = tuple(context.unify(a, b) for a, b in zip(context.dims(one), context.dims(two), strict=True))
            context.assign(one, dims)
            context.assign(two, dims)
    else:
        for tensor in (*values[0], *values[1]):
            for dim in context.dims(tensor):
                context.pin(dim, "training and evaluation return different things here")
    return evaluated
