"""The code that a forward leads to: whose globals it reads, in other packages too."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["reached_scopes"]

_OPAQUE = frozenset({*sys.stdlib_module_names, "torch", "numpy", "scipy", "sympy", "stp_fx"})
"""Packages that are not looked into: they ask nothing of a tensor that a proxy could not answer, or are patched themselves."""
_CALLABLES = frozenset({types.FunctionType, types.MethodType, functools.partial, torch.jit.ScriptFunction})
_MOST = 2000
"""Functions that are looked into."""


def reached_scopes(root: nn.Module) -> list[dict[str, Any]]:
    """The globals of the forwards of modules, of functions that modules hold, and of all that their code names:
    ``einops.rearrange`` asks for the type of a tensor as well."""
    scopes: dict[int, dict[str, Any]] = {}
    seen: set[types.FunctionType] = set()
    held: dict[type, list[types.FunctionType]] = {}
    for module in root.modules():
        found = held.setdefault(type(module), [])
        found += (f for value in vars(module).values() if type(value) in _CALLABLES for f in _functions(value))
    for kind, found in held.items():
        waiting = [*_functions(kind.forward), *found]
        while waiting and len(seen) < _MOST:
            function = waiting.pop()
            if function in seen:
                continue
            seen.add(function)
            scopes[id(function.__globals__)] = function.__globals__
            own = (getattr(kind, name, None) for name in _names(function.__code__))
            waiting += (each for each in _named(function) if not _is_opaque(each))
            waiting += (each for each in own if isinstance(each, types.FunctionType) and not _is_opaque(each))
    return list(scopes.values())


def _is_opaque(function: types.FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).partition(".")[0] in _OPAQUE


def _named(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """Functions that a function's code names, holds in its closure, or wraps."""
    names, scope = _names(function.__code__), function.__globals__
    for name in names:
        value = scope.get(name, sys.modules.get(name))  # a forward may import by itself
        if isinstance(value, types.ModuleType):
            held = vars(value)
            for attribute in names:
                yield from _functions(held.get(attribute))
        elif value is not None:
            yield from _functions(value)
    for cell in function.__closure__ or ():
        try:
            yield from _functions(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    yield from _functions(getattr(function, "__wrapped__", None))


def _functions(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, functools._lru_cache_wrapper):
        value = value.__wrapped__
    if isinstance(value, torch.jit.ScriptFunction):
        value = getattr(value, "_torchdynamo_inline", None)
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, type):
        yield from (each for each in vars(value).values() if isinstance(each, types.FunctionType))


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """All names that code and the code within it reads from globals or as attributes."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*inner)
