"""What holds of a network that was saved and loaded, and of the one that it was loaded with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import stp_fx
from stp_fx.io.tensors import stored_tensors

__all__ = ["assert_back", "assert_untouched", "snapshot"]


def assert_back(saved: fx.GraphModule, loaded: fx.GraphModule, *inputs: Any) -> None:
    """Names, bits, memory order, modes, gradients' flags, plan and outputs are the same."""
    theirs, ours = stored_tensors(saved), stored_tensors(loaded)
    assert {n: s.names for n, s in theirs.items()} == {n: s.names for n, s in ours.items()}
    for name, each in theirs.items():
        one, other = each.tensor, ours[name].tensor
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        assert one.stride() == other.stride(), name
        assert one.requires_grad == other.requires_grad, name
        assert torch.equal(one, other), name
        assert other.grad is None, name
    assert [(n, m.training) for n, m in saved.named_modules()] == [(n, m.training) for n, m in loaded.named_modules()]
    assert stp_fx.plan_of(loaded) == stp_fx.plan_of(saved)
    assert list(saved.state_dict()) == list(loaded.state_dict())
    for mode in (False, saved.training):
        saved.train(mode), loaded.train(mode)
        if inputs and not mode:
            with torch.no_grad():
                torch.testing.assert_close(loaded(*inputs), saved(*inputs), rtol=0, atol=0, equal_nan=True)


def snapshot(model: nn.Module) -> Any:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    values = {name: (id(t), t.detach().clone(), t.requires_grad, t.grad) for name, t in tensors.items()}
    return values, [(name, id(module), module.training, sorted(module.__dict__)) for name, module in model.named_modules()]


def assert_untouched(model: nn.Module, before: Any) -> None:
    values, modules = snapshot(model)
    assert modules == before[1]
    assert values.keys() == before[0].keys()
    for name, (identity, value, trained, gradient) in values.items():
        old = before[0][name]
        assert (identity, trained) == (old[0], old[2]), name
        assert torch.equal(value, old[1]), name
        assert gradient is old[3], name
