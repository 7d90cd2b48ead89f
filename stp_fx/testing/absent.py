"""The oracle for removal: the original network runs with the removed positions *absent*, and nothing is cut.

Every removed position of a parameter or buffer holds NaN. Pointwise ops, views and joins carry NaN along as they are. An op
that adds up, averages or normalises over positions leaves the absent ones out, as if they had never been there; a result
that only absent positions contribute to is absent too. So consumers read nothing of a removed unit, wherever the consumer is
(a weight's input column, a product of two activations, a sum, a softmax), sigmoid(0) = 0.5 and norm shifts do no harm,
and the values that remain are those of the network with its units removed.

The semantics is written per ATen op in numbers, and shares no code with the library: no factor lists, no coupling. A plan
that couples the wrong positions gives other numbers here, or NaN at an output. An op without a semantics raises.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stp_fx.analysis.plan import PrunePlan
from stp_fx.ir._torch_compat import is_pointwise
from stp_fx.testing.absent_ops import CARRIES, LIKE, NAN, POINTWISE, SEMANTICS, is_inexact, marked, pointwise, tensors_in

__all__ = ["Absent", "AbsentNorms", "OracleError", "absent_copy", "run_absent"]

_MADE = ("lifted_tensor_", "_tensor_constant")
"""How the front ends name such tensors."""


class OracleError(AssertionError):
    """The oracle has no semantics for an op, or something removed reached an output."""


def run_absent(module: nn.Module, plan: PrunePlan, inputs: Sequence[Any]) -> Any:
    """The output of ``module`` for ``inputs`` once everything that ``plan`` removes is absent; ``module`` is left as it is.

    Raises:
        OracleError: an op has no semantics here, or an absent value reached an output.
    """
    poisoned = absent_copy(module, plan)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), Absent(), AbsentNorms():
            out = poisoned(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    for tensor in tensors_in(out):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise OracleError("a removed unit reaches the output: the plan takes away what something still reads")
    return out


def absent_copy(module: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of ``module`` whose removed positions are NaN.

    Integer tensors (constant indices) stay as they are, and so do tensors that the module's code makes, which only the graph has.
    """
    copied = copy.deepcopy(module)
    # parametrised modules list their tensors under the names that the plan uses, too
    named: dict[str, torch.Tensor] = {
        **dict(copied.named_parameters(remove_duplicate=False)),
        **dict(copied.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for (name, dim), kept in plan.kept.items():
            if name.startswith(_MADE) or (name not in named and "lifted_tensor" in name):
                continue  # a constant that the forward's code makes, a buffer of the graph
            tensor = named[name]
            if is_inexact(tensor):
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[torch.as_tensor(kept.copy())] = False
                tensor.index_fill_(dim, gone.nonzero()[:, 0], NAN)
    return copied


class Absent(TorchDispatchMode):
    """Runs ATen ops with NaN read as "not there"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        floats = [t for t in tensors_in((args, kwargs)) if is_inexact(t)]
        if not any(bool(t.isnan().any()) for t in floats):
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if name in SEMANTICS:
            return SEMANTICS[name](func, args, kwargs)
        if name in LIKE:
            return marked(func(*args, **kwargs), args[0].isnan())
        if name in CARRIES:
            return func(*args, **kwargs)
        if is_pointwise(func) or name in POINTWISE:
            return pointwise(func, args, kwargs, floats)
        raise OracleError(f"the oracle has no semantics for {func}: add one to stp_fx.testing.absent_ops")


class AbsentNorms(TorchFunctionMode):
    """RMSNorm over a last dimension counts absent positions as zeros: the mean of squares is over as many positions as before.

    On its way to ATen the call falls apart, so it is caught as it is written.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.rms_norm, F.rms_norm):
            return func(*args, **kwargs)
        given: dict[str, Any] = {**dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)), **kwargs}
        x, shape, weight, eps = given["input"], given["normalized_shape"], given.get("weight"), given.get("eps")
        if len(shape) != 1:
            return func(*args, **kwargs)
        square = (x * x).sum(-1, keepdim=True) / shape[0]  # absent terms are left out of the sum
        result = x / (square + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
        return result if weight is None else result * weight
