"""The target "memory": weights, and the activations that are alive at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stp_fx
from stp_fx.analysis.build import analyze
from stp_fx.passes import memory_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.last = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = x + self.last(F.relu(self.inner(x), inplace=True))
        return self.head(x.mean((2, 3)))


def captured() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net().eval(), torch.randn(2, 3, 8, 8))


def test_by_hand() -> None:
    gm = captured()
    whole, model = analyze(gm).survivors(), memory_model(gm)
    weights = sum(t.numel() * t.element_size() for t in (*gm.parameters(), *gm.buffers()))
    assert model.weight_bytes(whole) == weights
    image, residual, inner = (4 * 2 * channels * 64 for channels in (3, 16, 32))
    # While `last` runs: the input, the residual, what it reads (the relu writes in place), and what it gives.
    assert model.activation_bytes(whole) == image + residual + inner + residual
    assert model.predict(whole) == weights + image + 2 * residual + inner
    assert repr(model) == f"MemoryModel({len(model.weights)} weights, {len(model.storages)} activations)"


def test_what_is_foreseen_is_what_the_result_has() -> None:
    gm = captured()
    plan = analyze(gm).plan_for({"inner": range(12), "first": [0, 5, 7]})
    foreseen = memory_model(gm).predict(analyze(gm).survivors(plan))
    pruned = stp_fx.apply_plan(gm, plan)
    assert memory_model(pruned).predict(analyze(pruned).survivors()) == foreseen


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"allocation": "optimal"}])
def test_the_target_is_met(options: dict[str, Any]) -> None:
    gm, data = captured(), [torch.randn(8, 3, 8, 8)]
    pruned = stp_fx.prune_graph(gm, "magnitude", 0.3, target="memory", calibration=data, **options)
    before, after = (memory_model(g).predict(analyze(g).survivors()) for g in (gm, pruned))
    assert 0.6 * before < after <= 0.7 * before


def test_a_view_is_no_memory_of_its_own() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).view(-1, 2, 4)
            left, right = y.unbind(1)
            return self.last(left) + right[:, :2]

    gm = stp_fx.trace(Views().eval(), torch.randn(3, 4))
    # The input, the value that all views share, the output of `last`, and the sum.
    assert memory_model(gm).activation_bytes(analyze(gm).survivors()) == 4 * 3 * (4 + 8 + 2 + 2)
