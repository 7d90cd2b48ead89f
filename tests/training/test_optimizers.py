"""Optimizers of PyTorch, timm, torchao, transformers and others beside a step: followed exactly, or refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import CASES, COMBINATIONS, Net, X, Y, refused, run, train
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError

QUICK = ("SGD fused", "Adam fused amsgrad", "Adagrad fused", "Adafactor", "LBFGS", "Muon", "ZeroRedundancyOptimizer")
LIBRARIES = {"timm": "timm", "torchao": "torchao", "transformers": "transformers", "schedule-free": "schedulefree"}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    """For ZeroRedundancyOptimizer."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def holds(name: str, masks: bool, compensation: str | None, memory: torch.memory_format) -> None:
    for word, library in LIBRARIES.items():
        if name.startswith(word) and importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9")
    found, by = run(name, masks, compensation, memory), refused(name, compensation)
    if by is not None:
        assert isinstance(found, str), "it must be refused"
        assert by in found
    else:
        assert not isinstance(found, str), found
        assert found < 1e-6


@pytest.mark.parametrize("compensation", [None, "mean"])
@pytest.mark.parametrize("name", QUICK)
def test_it_goes_on_as_a_plain_one_or_is_refused(name: str, compensation: str | None) -> None:
    holds(name, False, compensation, torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize(("masks", "compensation", "memory"), COMBINATIONS)
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("torchao")])  # their steps are compiled
def test_all_optimizers_go_on_as_plain_ones_or_are_refused(
    name: str, masks: bool, compensation: str | None, memory: torch.memory_format
) -> None:
    holds(name, masks, compensation, memory)


def traced(memory: torch.memory_format = torch.contiguous_format) -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net().double().to(memory_format=memory), X)


def test_parameter_gradient_and_state_agree_in_memory_after_a_cut() -> None:
    gm = traced(torch.channels_last)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    pat = stp_fx.PATPassManager(gm, ratio=0.5, optimizer=optimizer)
    train(gm, [optimizer], torch.channels_last)
    pat.prune(0)
    train(gm, [optimizer], torch.channels_last, 1)
    weight = gm.get_parameter("b.weight")
    state = optimizer.state[weight]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.grad is not None
    assert weight.stride() == weight.grad.stride() == state["exp_avg"].stride() == state["exp_avg_sq"].stride()


def test_an_optimizer_of_another_network_is_refused() -> None:
    gm = traced()
    for other in (torch.optim.SGD(Net().parameters(), lr=0.1), [torch.optim.SGD(traced().parameters(), lr=0.1)]):
        with pytest.raises(InputError, match="belongs to another network"):
            stp_fx.PATPassManager(gm, optimizer=other)
    pat = stp_fx.PATPassManager(gm, optimizer=())
    with pytest.raises(InputError, match="belongs to another network"):
        pat.connect(torch.optim.SGD(Net().parameters(), lr=0.1))
    both = [torch.optim.SGD(Net().parameters(), lr=0.1), torch.optim.SGD(gm.parameters(), lr=0.1)]
    assert stp_fx.PATPassManager(gm, optimizer=both).optimizers == tuple(both)


def test_that_no_optimizer_is_given_is_said(caplog: pytest.LogCaptureFixture) -> None:
    stp_fx.PATPassManager(traced(), optimizer=())
    assert "no optimizer" not in caplog.text
    stp_fx.PATPassManager(traced())
    assert "no optimizer is given" in caplog.text


def test_a_bias_joins_those_beside_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9")
    gm = traced()
    matrices = torch.optim.Muon([gm.mid.weight, gm.head.weight], lr=0.01)
    kernels = torch.optim.SGD(
        [{"params": [gm.a.weight, gm.b.weight]}, {"params": [gm.a.bias, *gm.norm.parameters(), gm.head.bias]}]
    )
    pat = stp_fx.PATPassManager(gm, ratio=0.5, compensation="mean", train_loader=[(X, Y)], optimizer=[matrices, kernels])
    pat.prune(0)
    added: Any = gm.get_parameter("mid.bias")
    assert any(p is added for p in kernels.param_groups[1]["params"])
    lonely = traced()
    only = torch.optim.Muon([lonely.mid.weight, lonely.head.weight], lr=0.01)
    pat = stp_fx.PATPassManager(lonely, ratio=0.5, compensation="mean", train_loader=[(X, Y)], optimizer=only)
    with pytest.raises(InputError, match=r"mid.bias.*Muon cannot train"):
        pat.prune(0)
    assert lonely.get_parameter("mid.weight").shape == (12, 8)


class Whole(torch.optim.Optimizer):
    """One buffer of all parameters, and arguments of its own: no step on a made-up parameter shows it."""

    def __init__(self, params: Any, name: str) -> None:
        super().__init__(params, {})
        self.name = name

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        first = self.param_groups[0]["params"][0]
        self.state[first]["history"] = [torch.zeros(sum(p.numel() for p in self.param_groups[0]["params"]))]


def test_state_that_only_a_step_shows_is_refused_before_the_next_pruning_step() -> None:
    gm = traced()
    optimizer = Whole(gm.parameters(), "mine")
    pat = stp_fx.PATPassManager(gm, optimizer=optimizer)
    optimizer.step()
    with pytest.raises(InputError, match=r"Whole keeps 'history' of 'a.weight' in a list"):
        pat.prune(0)
    assert gm.get_parameter("a.weight").shape == (8, 3, 3, 3)
    with pytest.raises(InputError, match="Whole keeps 'history'"):
        stp_fx.PATPassManager(traced_again(gm), optimizer=optimizer)


def traced_again(gm: nn.Module) -> fx.GraphModule:
    return stp_fx.trace(gm, X)
