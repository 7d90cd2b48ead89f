"""Recurrent layers: a removed unit is one whose state nobody reads, neither the next step nor the next layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stp_fx

X = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Sequences(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(5, 8, batch_first=True, **options)
        width = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0])


KINDS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"num_layers": 3, "bias": False}),
    (nn.GRU, {"bidirectional": True}),
    (nn.RNN, {"num_layers": 2, "nonlinearity": "relu"}),
]


def built(kind: type[nn.RNNBase], options: dict[str, Any]) -> Sequences:
    torch.manual_seed(1)
    return Sequences(kind, **options).double().eval()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_removed_is_the_original_with_the_units_columns_zeroed(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    model = built(kind, options)
    pruned = stp_fx.prune_graph(stp_fx.trace(model, X), ratio=0.5)
    assert pruned.cell.hidden_size == 4
    kept = stp_fx.plan_of(pruned).kept["cell.weight_hh_l0", 1]
    dead = sorted(set(range(8)) - set(kept.tolist()))
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in oracle.cell.named_parameters():
            if name.startswith("weight_hh"):
                weight[:, dead] = 0
            elif name.startswith("weight_ih") and "_l0" not in name:
                weight[:, [d + shift for shift in range(0, weight.shape[1], 8) for d in dead]] = 0
        oracle.head.weight[:, [d + shift for shift in range(0, oracle.head.in_features, 8) for d in dead]] = 0
    assert torch.allclose(pruned(X), oracle(X), atol=1e-12)
    assert not torch.allclose(pruned(X), model(X), atol=1e-3)
    assert torch.allclose(pruned(X[:2, :3]), oracle(X[:2, :3]), atol=1e-12)


def test_projections_and_hidden_units_are_groups_of_their_own() -> None:
    model = built(nn.LSTM, {"proj_size": 4})
    graph = stp_fx.analyze(stp_fx.trace(model, X))
    assert sorted(group.size for group in graph.groups) == [4, 8]
    assert not any(group.exact for group in graph.groups)
    pruned = stp_fx.prune_graph(stp_fx.trace(model, X), ratio=0.5)
    assert (pruned.cell.proj_size, pruned.cell.hidden_size) == (2, 4)
    assert pruned(X).shape == (3, 7, 3)


def test_cost_is_that_of_every_step() -> None:
    gm = stp_fx.trace(built(nn.LSTM, {"num_layers": 2}), X)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    for graph in (gm, pruned):
        hidden = graph.cell.hidden_size
        steps = 3 * 7 * 4 * hidden * ((5 + hidden) + (hidden + hidden))
        assert stp_fx.cost(graph).macs == steps + 3 * 7 * hidden * 3
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            graph.to("meta")(X.to("meta"))
        assert counter.get_total_flops() // 2 == stp_fx.cost(graph).macs


def test_in_a_training_loop_the_layer_stays_the_same_object() -> None:
    model = built(nn.LSTM, {"num_layers": 2, "dropout": 0.3}).float()
    gm = stp_fx.trace(model, X.float()).train()
    optimizer = torch.optim.Adam(gm.parameters())
    pat = stp_fx.PATPassManager(gm, criterion="magnitude", ratio=0.5, steps=2, optimizer=optimizer, mask_until_last=False)
    for epoch in range(3):
        pat.prune(epoch)
        optimizer.zero_grad()
        gm(X.float()).square().sum().backward()
        optimizer.step()
    assert gm.cell.hidden_size == 4
    assert all(p.grad is not None and p.grad.shape == p.shape for p in gm.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(gm.parameters()))
