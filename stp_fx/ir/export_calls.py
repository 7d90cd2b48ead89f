"""Which call of PyTorch's own does what an ATen overload does, with the same arguments in the same order."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stp_fx.ir.schema import writes_to

__all__ = [
    "feature_dropout_in_mode",
    "instance_norm_in_mode",
    "python_call",
    "recurrent_in_mode",
    "schema_of",
    "written_later",
]

_ALIKE = ("einsum", "meshgrid")
"""Functions of ``torch`` that are written in Python and take what ATen takes."""


def python_call(target: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[str, Any, dict[str, Any]]:
    """Kind and target of the node that does what ``target`` does, and named arguments that it takes besides.

    Where no function is known to take the same arguments, that is the overload itself.
    """
    name = target._opname
    if target.namespace == "aten" and args and isinstance(args[0], fx.Node) and _is_method(name):
        return "call_method", name, {}
    found = _function(target) if target.namespace == "aten" else None
    return ("call_function", target, {}) if found is None else ("call_function", found[0], dict(found[1]))


def _is_method(name: str) -> bool:
    """Whether tensors have a method that takes what the ATen op takes; those written in Python may sort arguments otherwise."""
    return isinstance(getattr(torch.Tensor, name, None), types.MethodDescriptorType) or name in ("split", "norm")


@functools.lru_cache(maxsize=1024)
def _function(target: torch._ops.OpOverload) -> tuple[Any, dict[str, Any]] | None:
    name = target._opname
    if name.startswith("_"):
        return None
    for owner in (torch, F):
        found = getattr(owner, name, None)
        if isinstance(found, types.BuiltinFunctionType) or (owner is torch and name in _ALIKE):
            return found, {}
    functional = getattr(F, name.removesuffix("_"), None)
    if not inspect.isfunction(functional) or len(target._schema.returns) != 1:
        return None
    parameters = inspect.signature(functional).parameters
    theirs, given = list(parameters), [a for a in target._schema.arguments if not a.kwarg_only]
    if theirs[: len(given)] != ["input" if a.name == "self" else a.name for a in given]:
        return None
    if any(isinstance(parameters[name].default, str) for name in theirs[: len(given)]):
        return None  # a reduction has a name here and a number there
    if not name.endswith("_"):
        return functional, {}
    return (functional, {"inplace": True}) if "inplace" in theirs[len(given) :] else None


def schema_of(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults included; and the op's name as ``op``."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)}
    defaults = {a.name: a.default_value if a.has_default_value() else None for a in schema}
    return defaults | given | kwargs | {"op": node.target._opname}  # type: ignore[union-attr]


def written_later(node: fx.Node) -> bool:
    """Whether the tensor that a node of an export gives is written to, by itself or by a view, or returned."""
    for user in node.users:
        target: Any = user.target
        if user.op == "output":
            return True
        if not isinstance(target, torch._ops.OpOverload):
            continue
        detaches = target._opname in ("detach_", "detach", "alias")
        if not detaches and any(k < len(user.args) and user.args[k] is node for k in writes_to(target)):
            return True
        views = any(r.alias_info is not None for r in target._schema.returns)
        if (views or detaches) and written_later(user):
            return True
    return False


def feature_dropout_in_mode(x: torch.Tensor, p: float, training: bool, inplace: bool = False) -> torch.Tensor:
    """Dropout of whole channels, in training."""
    return (torch.feature_dropout_ if inplace else torch.feature_dropout)(x, p, training)


def instance_norm_in_mode(
    x: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    training: bool,
) -> torch.Tensor:
    """Instance norm with running statistics: those of the input in training, the stored ones in evaluation."""
    return F.instance_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def recurrent_in_mode(
    kind: str, x: torch.Tensor, state: Any, weights: Any, biased: bool, layers: int, dropout: float, two: bool, first: bool,
    training: bool,
) -> Any:  # fmt: skip
    """``torch.lstm`` and the like, with dropout between layers in training."""
    return getattr(torch, kind)(x, state, weights, biased, layers, dropout, training, two, first)
