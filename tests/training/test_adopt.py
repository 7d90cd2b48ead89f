"""What a rewrite leaves where it is: memory of parameters and buffers, compiled code around the graph, and the user's copy."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.norm(self.a(x)).relu()).relu())


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net().double(), X)


@pytest.mark.parametrize("compensation", [None, "mean"])
def test_a_step_that_masks_moves_nothing(compensation: str | None) -> None:
    gm = traced()
    gm.share_memory()
    before = {key: (value, value.data_ptr()) for key, value in (*gm.named_parameters(), *gm.named_buffers())}
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=3, compensation=compensation, train_loader=[X], optimizer=())
    for epoch in range(2):
        held = gm(X).sum()  # saves parameters and buffers for its backward pass
        pat.prune(epoch)
        now = dict((*gm.named_parameters(), *gm.named_buffers()))
        for key, (tensor, place) in before.items():
            assert now[key] is tensor, key
            assert tensor.data_ptr() == place, key
            assert tensor.is_shared()
        held.backward()
    assert compensation is None or not torch.equal(gm.get_parameter("c.bias"), traced().get_parameter("c.bias"))


def test_a_mask_that_grows_is_written_where_it_was() -> None:
    gm = traced()
    pat = stp_fx.PATPassManager(gm, ratio=0.6, steps=3, optimizer=())
    pat.prune(0)
    first = {name: (mask.data_ptr(), mask.sum()) for name, mask in gm.named_buffers() if name.startswith("stp_fx")}
    pat.prune(1)
    second = {name: (mask.data_ptr(), mask.sum()) for name, mask in gm.named_buffers() if name.startswith("stp_fx")}
    assert first
    assert {name: place for name, (place, _) in first.items()} == {name: place for name, (place, _) in second.items()}
    assert all(second[name][1] > count for name, (_, count) in first.items())


class Outer(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).softmax(-1)


@pytest.mark.parametrize("mode", [True, False])
def test_what_is_compiled_around_the_graph_sees_masks_made_later(mode: bool) -> None:
    torch._dynamo.reset()
    gm = traced().train(mode)
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=3, optimizer=())
    compiled: Any = torch.compile(Outer(gm), backend="eager")
    function: Any = torch.compile(lambda x: gm(x).softmax(-1), backend="eager")
    with torch.no_grad():
        whole = compiled(X)
        for epoch in range(3):
            function(X)
            pat.prune(epoch)
            expected = copy.deepcopy(gm)(X).softmax(-1)
            assert not torch.allclose(expected, whole)
            assert torch.allclose(compiled(X), expected)
            assert torch.allclose(function(X), expected)


def test_compensation_says_which_frozen_parameters_it_rewrites(caplog: pytest.LogCaptureFixture) -> None:
    for frozen in (("c.weight", "c.bias"), ()):
        gm = traced()
        for name in frozen:
            gm.get_parameter(name).requires_grad_(False)
        before = gm.get_parameter("c.bias").clone()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stp_fx.PATPassManager(gm, ratio=0.5, compensation="mean", train_loader=[X], optimizer=()).prune(0)
        assert ("rewrites 1 parameters that are frozen: c.bias" in caplog.text) == bool(frozen)
        assert not torch.equal(gm.get_parameter("c.bias"), before)
        assert gm.get_parameter("c.bias").requires_grad != bool(frozen)


def test_without_inplace_the_graph_and_its_model_stay() -> None:
    torch.manual_seed(0)
    net = Net().double()
    gm = stp_fx.trace(net, X)
    before = copy.deepcopy(gm.state_dict())
    pat = stp_fx.PATPassManager(gm, ratio=0.5, inplace=False, optimizer=())
    optimizer = torch.optim.Adam(pat.model.parameters())
    pat.connect(optimizer)
    pat.model(X).sum().backward()
    optimizer.step()
    pat.prune(0)
    assert pat.model is not gm
    assert pat.model.get_parameter("b.weight").shape == (4, 4)
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
    assert torch.equal(net.eval()(X), gm.eval()(X))
    with pytest.raises(InputError, match="belongs to another network"):
        stp_fx.PATPassManager(gm, inplace=False, optimizer=torch.optim.Adam(gm.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recalibrate": -1, "train_loader": [X]}, "recalibrate"),
        ({"wrap": 5}, "wrap"),
        ({"inplace": "no"}, "inplace"),
        ({"every": 0}, "every"),
        ({"start_step": -1}, "start_step"),
        ({"steps": 4, "end_step": 2}, "end_step"),
    ],
)
def test_bad_arguments_leave_the_graph_alone(arguments: dict[str, Any], message: str) -> None:
    gm = traced()
    code = gm.code
    with pytest.raises(InputError, match=message):
        stp_fx.PATPassManager(gm, regularizer="variance_entropy", optimizer=(), **arguments)
    assert gm.code == code  # no observers


# -- schedules in optimizer steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps": 3, "every": 2}, [1, 2, 4]),
        ({"steps": 3, "start_step": 2, "every": 3}, [2, 5, 8]),
        ({"steps": 3, "start_step": 1, "end_step": 9}, [1, 5, 9]),
        ({"steps": 1, "start_step": 4}, [4]),
        ({"steps": 3}, []),
    ],
)
def test_steps_of_the_optimizer(arguments: dict[str, int], expected: list[int]) -> None:
    pat = stp_fx.PATPassManager(traced(), ratio=0.6, optimizer=(), **arguments)  # type: ignore[arg-type]
    assert [count for count in range(1, 12) if pat.step()] == expected
    assert pat.finished == bool(expected)
    assert pat.count == 11
    assert pat.prune(5) != bool(expected)
    assert pat.epoch == 5


def test_a_run_by_optimizer_steps_is_resumed_in_the_midst_of_an_epoch() -> None:
    def start() -> tuple[stp_fx.PATPassManager, torch.optim.Optimizer]:
        gm = traced()
        optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
        return stp_fx.PATPassManager(gm, ratio=0.6, steps=4, start_step=2, every=3, optimizer=optimizer), optimizer

    def train(pat: stp_fx.PATPassManager, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            pat.model(X).square().mean().backward()
            optimizer.step()
            pat.step()

    whole, optimizer = start()
    train(whole, optimizer, 13)
    assert whole.finished
    first, optimizer = start()
    train(first, optimizer, 6)
    saved = copy.deepcopy((first.state_dict(), first.model.state_dict(), optimizer.state_dict()))
    second, optimizer = start()
    second.load_state_dict(saved[0])
    second.model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(second, optimizer, 7)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in second.model.state_dict().items())
