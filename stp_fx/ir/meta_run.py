"""Running ATen calls for their shapes alone."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stp_fx.ir._torch_compat import meta_kernels
from stp_fx.ir.data_sizes import BY_DATA
from stp_fx.ir.known_shapes import known_result

__all__ = ["AsksForNumber", "MetaRun", "import_compiler", "run_for_shape", "shortcut"]

_aten = torch.ops.aten


_DIRECT: dict[Any, Callable[..., Any]] = {}


def shortcut(func: Any, shape: Callable[..., Any]) -> None:
    """Lets ``shape`` give the results of ``func`` on meta tensors of floating point; NotImplemented leaves a call to torch.

    For ops whose shapes torch works out through Python decompositions of 0.3 to 0.9 ms a call, which would be most of a meta
    forward's time. The entries of ``stp_fx.rules`` give them.
    """
    _DIRECT[func] = shape


def _same(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(x)


shortcut(_aten.gelu.default, _same)  # pointwise, so it has no entry


for _op, _kernel in meta_kernels().items():
    shortcut(_op, _kernel)


def run_for_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an op on meta tensors; tensors that the op makes from nothing go to the meta device as well."""
    if "device" in kwargs or func is _aten.scalar_tensor.default:
        kwargs = {**kwargs, "device": torch.device("meta")}
    if func is _aten.lift_fresh.default and args[0].dim():
        return args[0].to("meta")  # torch.tensor(...): a single number may stay where it is
    by_data = BY_DATA.get(func)
    if by_data is not None and args[0].is_meta:
        result = by_data(*args, **kwargs)
        if result is not NotImplemented:
            return result
    direct = _DIRECT.get(func)
    if direct is not None:
        first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            result = direct(*args, **kwargs)
            if result is not NotImplemented:
                return result
    known = known_result(func, args, kwargs)
    return func(*args, **kwargs) if known is NotImplemented else known


_FROZEN_BY_PYTHON = 1000
"""Python 3.12 starts with some hundred objects that are frozen; who calls ``gc.freeze()`` has a hundred times as many."""


def import_compiler() -> None:
    """Imports ``torch._dynamo``, as the first op on the meta device and the first op under a mode do in any case.

    Of 1.6 s that this takes, 0.5 s would go to looking for garbage among objects that stay. So nothing looks meanwhile, and what
    there is then counts as old.
    """
    if "torch._dynamo" in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module("torch._dynamo")
        if gc.get_freeze_count() < _FROZEN_BY_PYTHON:  # else somebody else's would thaw
            gc.freeze()
            gc.unfreeze()
    finally:
        if collects:
            gc.enable()


class AsksForNumber(RuntimeError):
    """An op that takes a number was given a tensor on the meta device, which has none."""


class MetaRun(TorchDispatchMode):
    """A mode under which a graph runs for its shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            raise AsksForNumber("takes the number of a tensor that has no value")
        return run_for_shape(func, args, dict(kwargs or {}))
