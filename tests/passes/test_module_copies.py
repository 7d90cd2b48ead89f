"""Copies of modules are those of ``copy.deepcopy``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from stp_fx.rewrite.module_copies import copy_modules_of_torch


class _Own(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Own:
        return self


class _Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(3, 3, 1)
        self.parts = nn.ModuleList([shared, nn.BatchNorm2d(3), nn.Sequential(shared, nn.ReLU()), _Own(2, 2)])
        self.rnn = nn.LSTM(3, 4, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2)
        self.parts[1].weight = nn.Parameter(torch.ones(3))
        self.parts[1].__dict__["note"] = [1, [2]]
        self.parts[0].register_forward_hook(_hook)
        self.tied = self.parts[1].weight


def _hook(module: nn.Module, args: Any, result: Any) -> None:
    return None


def _copied(root: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    memo = {} if memo is None else memo
    copy_modules_of_torch(root, memo)
    return copy.deepcopy(root, memo)


def _content(module: nn.Module) -> dict[str, Any]:
    """Every attribute of every module; tensors as numbers, and the first names of modules and tensors that stand in places."""
    names: dict[int, str] = {}
    found: dict[str, Any] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        found[path] = (type(each), names.setdefault(id(each), path))
        for key, value in each.__dict__.items():
            if key in ("_parameters", "_buffers"):
                value = {k: None if t is None else (names.setdefault(id(t), f"{path}.{k}"), type(t), t.requires_grad, t.tolist())
                         for k, t in value.items()}  # fmt: skip
            elif key == "_modules":
                value = list(value)
            elif key in ("_flat_weights", "_flat_weight_refs"):
                continue
            found[f"{path}:{key}"] = (type(value), value)
    return found


def test_a_copy_is_that_of_deepcopy() -> None:
    root = _Root()
    expected, found = _content(copy.deepcopy(root)), _content(_copied(root))
    assert found == expected


def _tensors(root: nn.Module) -> set[int]:
    own = [module for module in root.modules() if not isinstance(module, _Own)]
    return {id(tensor) for module in own for tensor in module._parameters.values() if tensor is not None}


def test_nothing_is_shared_with_the_original() -> None:
    root = _Root()
    result = _copied(root)
    assert result.parts[0] is result.parts[2][0]
    assert result.tied is result.parts[1].weight
    assert result.parts[3] is root.parts[3]  # as its class says
    assert not _tensors(root) & _tensors(result)
    result.parts[1].note[1].append(3)
    result.parts[0]._forward_hooks.clear()
    assert root.parts[1].note == [1, [2]]
    assert len(root.parts[0]._forward_hooks) == 1
    assert result.rnn._flat_weights[0] is result.rnn.weight_ih_l0


def test_replaced_tensors() -> None:
    root, new = _Root(), nn.Parameter(torch.zeros(3))
    result = _copied(root, {id(root.tied): new})
    assert result.tied is new
    assert result.parts[1].weight is new


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_the_same_function(name: str) -> None:
    model, x = getattr(models, name)().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(_copied(model)(x), model(x))
