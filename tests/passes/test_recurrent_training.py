"""Repairs that train, on recurrent layers, whose own weights no regression refits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.passes import Distill, Pipeline, ReconstructBlockwise, ReconstructSequentially, RemoveChannels

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


class Recurrent(nn.Module):
    """A recurrent layer of which unit 1 is the same as unit 0: without it, other weights give the same outputs."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int = 5) -> None:
        super().__init__()
        self.layer, self.head = kind(3, hidden, batch_first=True), nn.Linear(hidden, 4)
        self.double()
        for name, weight in self.layer.named_parameters():
            rows = weight.data.view(-1, hidden, *weight.shape[1:])  # [gates, hidden, ...]
            rows[:, 1] = rows[:, 0]
            if name == "weight_hh_l0":
                rows.mul_(2.0)

    def forward(self, x):
        return self.head(self.layer(x)[0])


def made(kind: str):
    torch.manual_seed(0)
    model, x = Recurrent(KINDS[kind]).eval(), torch.randn(16, 5, 3, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    plan = stp_fx.analyze(gm).plan_for({"layer.weight_hh_l0:1": [1]})
    return gm, plan, [x[:8], x[8:12], x[12:]]


def error(gm, repair, plan, data) -> float:
    """Of the pruned network's outputs on new data, relative to the variance of the original's."""
    pruned = Pipeline(*repair, RemoveChannels(plan))(gm).graph_module
    x = torch.randn(32, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = gm(x)
        return float((pruned(x) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [ReconstructBlockwise, Distill])
def test_recurrent_weights_are_trained(kind, method):
    gm, plan, data = made(kind)
    before = error(gm, [ReconstructSequentially(data, plan=plan)], plan, data)
    repair = method(data, steps=300, rate=0.03, plan=plan)
    assert error(gm, [repair], plan, data) < 0.25 * before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_removed_keeps_its_numbers_and_the_rest_is_reported(kind):
    gm, plan, data = made(kind)
    done = ReconstructBlockwise(data, steps=20, plan=plan)(gm)
    before, after = gm.get_submodule("layer"), done.graph_module.get_submodule("layer")
    old, new = (m.weight_hh_l0.detach().view(-1, 5, 5) for m in (before, after))
    removed = torch.zeros(5, 5, dtype=torch.bool)
    removed[1], removed[:, 1] = True, True
    assert torch.equal(old[:, removed], new[:, removed])
    assert not torch.equal(old[:, ~removed], new[:, ~removed])


def test_layers_with_hooks_stay_and_are_named(caplog):
    gm, plan, data = made("LSTM")
    gm.get_submodule("layer").register_forward_hook(lambda *_: None)
    with caplog.at_level("INFO", logger="stp_fx"):
        done = ReconstructBlockwise(data, steps=5, plan=plan)(gm)
    assert torch.equal(gm.get_submodule("layer").weight_ih_l0, done.graph_module.get_submodule("layer").weight_ih_l0)
    assert "layer is not repaired (blockwise): it has hooks" in caplog.text
