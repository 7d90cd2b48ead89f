"""Pointwise ops need no entry: torch tags them. Broadcasting aligns from the right."""

from __future__ import annotations

import torch

from stp_fx.ir._torch_compat import is_pointwise
from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import Dim, Dims, fixed_dim

__all__ = ["broadcast", "is_pointwise", "pointwise"]

_ROLES = {"mul": "scale", "div": "scale", "add": "bias", "sub": "bias"}


def pointwise(call: OpCall) -> None:
    """Every operand's dimension that is as long as the result's is removed with it."""
    operands = call.operands
    role = _ROLES.get(call.name.rstrip("_"), "other")
    for operand in operands:
        call.reads(operand, role)
    for tensor in call.outs:
        call.assign(tensor, broadcast(call, operands, tuple(tensor.shape)))


def broadcast(call: OpCall, operands: list[torch.Tensor], shape: tuple[int, ...]) -> Dims:
    """The joined factors of operands that broadcast to ``shape``."""
    rank = len(shape)
    result: list[Dim] = [() for _ in shape]
    seen = [False] * rank
    for operand in operands:
        dims = call.dims(operand)
        for k in range(1, min(operand.dim(), rank) + 1):
            at = rank - k
            if shape[at] == 1 or operand.shape[-k] != shape[at]:
                continue
            result[at] = call.unify(result[at], dims[-k]) if seen[at] else dims[-k]
            seen[at] = True
    return tuple(dim if seen[k] else fixed_dim(shape[k]) for k, dim in enumerate(result))
