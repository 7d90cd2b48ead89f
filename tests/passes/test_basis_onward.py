"""What users do with a network in another basis: in half precision, quantised, trained with pruning, repaired."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from prenorm import PreNorm
from torch import fx

import stp_fx
from stp_fx.passes import Distill, Pipeline, ReconstructSequentially, RemoveChannels, RotateHeads, RotateResidual

SEED = next(s for s in range(99) if PreNorm(s).kind == "layer" and PreNorm(s).images)


def rotated(dtype: torch.dtype) -> tuple[PreNorm, fx.GraphModule, torch.Tensor]:
    model = PreNorm(SEED)
    x = model.example(8).to(dtype)
    gm = stp_fx.trace(model.to(dtype), x)
    return model, Pipeline(RotateResidual([x]), RotateHeads([x]))(gm).graph_module, x


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    """Not much further from the network in double precision than that network in half precision is itself."""
    model, graph, x = rotated(dtype)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    assert all(p.dtype == dtype for p in graph.parameters())
    with torch.no_grad():
        assert distance(graph(x), exact) < 4 * distance(model(x), exact) + 4 * torch.finfo(dtype).eps


def test_int8_weights_of_a_network_in_another_basis() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao warns of what it deprecates in itself
        quantization = pytest.importorskip("torchao.quantization", reason="the extra `ship` is not installed")
        _, graph, x = rotated(torch.float32)
        pruned = stp_fx.prune_graph(graph, "variance", 0.3, calibration=[x])
        quantized = copy.deepcopy(pruned)
        quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
        with torch.no_grad():
            assert distance(quantized(x), pruned(x)) < 0.1
    assert any(type(p.data) is not torch.Tensor for p in quantized.parameters())


def test_pruning_aware_training_in_another_basis() -> None:
    """The last cut gives what one-shot pruning of the same weights gives."""
    _, graph, x = rotated(torch.float64)
    optimizer = torch.optim.AdamW(graph.parameters(), 1e-3)
    before = sum(p.numel() for p in graph.parameters())
    pat = stp_fx.PATPassManager(graph, optimizer=optimizer, criterion="variance", train_loader=[x], ratio=0.4, steps=3)
    for epoch in range(3):
        at_the_end = epoch == 2
        if at_the_end:
            expected = stp_fx.prune_graph(graph, "variance", 0.4, calibration=[x]).eval()(x).detach()
        assert pat.prune(epoch)
        if at_the_end:
            torch.testing.assert_close(graph.eval()(x), expected, rtol=1e-9, atol=1e-9)
            graph.train()
        optimizer.zero_grad()
        graph(x).square().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in graph.parameters() if p.grad is not None)
        optimizer.step()
    assert pat.finished
    assert sum(p.numel() for p in graph.parameters()) < before


def test_repairs_in_another_basis_come_nearer_to_the_original() -> None:
    model, graph, x = rotated(torch.float64)
    plan = stp_fx.plan_of(stp_fx.prune_graph(graph, "variance", 0.4, calibration=[x]))
    new = model.example(32, 5)
    expected = model(new).detach()
    parts = [x[:4], x[4:]]
    plain = stp_fx.apply_plan(graph, plan)
    sequential = Pipeline(ReconstructSequentially(parts, plan=plan), RemoveChannels(plan))(graph).graph_module
    trained = Pipeline(Distill(parts, 20, plan=plan), RemoveChannels(plan))(graph).graph_module
    with torch.no_grad():
        worst, better, best = (distance(each(new), expected) for each in (plain, sequential, trained))
    assert better < worst
    assert best < worst
