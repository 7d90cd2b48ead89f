"""Deep copies of many modules in a fraction of the time that ``copy.deepcopy`` takes.

``copy.deepcopy`` copies some 25 attributes of each module one by one, most of them empty dicts for hooks. The modules of
``torch.nn`` say nothing about how they are copied, so they can be copied here; every other object is left to ``copy``.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["copy_modules_of_torch"]

_ATOMS = (int, float, bool, str, type(None), torch.dtype, torch.device)
_OWN = frozenset(nn.Module().__dict__)
"""The attributes of every module, most of them dicts for hooks."""
_HOW_TO_COPY = frozenset(("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__"))

_MODULES_SAY = "__getstate__" in nn.Module.__dict__
"""Whether ``nn.Module`` leaves attributes out of copies, as it does in recent versions of torch."""


def copy_modules_of_torch(root: nn.Module, memo: dict[int, Any]) -> None:
    """Enters a deep copy of every module of ``torch.nn`` below ``root`` into ``memo``, as ``copy.deepcopy`` fills it.

    Tensors that are in ``memo`` are replaced by what stands there."""
    for module in root.modules():
        if id(module) not in memo and _is_plain(type(module)):
            _copy(module, memo)


@functools.cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether the class is torch's and leaves copies of its modules to ``copy``."""
    own = {name for each in kind.__mro__ if each not in (object, nn.Module) for name in each.__dict__}
    return kind.__module__.startswith("torch.nn.modules.") and not own & _HOW_TO_COPY


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    result = module.__class__.__new__(module.__class__)
    memo[id(module)] = result
    state = module.__getstate__() if _MODULES_SAY else module.__dict__
    result.__setstate__({key: _copied(key, value, memo) for key, value in state.items()})
    return result


def _copied(key: str, value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _ATOMS:
        return value
    if key in _OWN and type(value) in (dict, OrderedDict, set):
        if not value:
            return type(value)()
        if key in ("_parameters", "_buffers"):
            return {name: copy.deepcopy(tensor, memo) for name, tensor in value.items()}
        if key == "_modules":
            return {name: _child(child, memo) for name, child in value.items()}
    elif type(value) is tuple and all(type(each) in _ATOMS for each in value):
        return value
    return copy.deepcopy(value, memo)


def _child(child: nn.Module | None, memo: dict[int, Any]) -> nn.Module | None:
    if child is None or id(child) in memo or not _is_plain(type(child)):
        return copy.deepcopy(child, memo)
    return _copy(child, memo)
