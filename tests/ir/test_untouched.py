"""A trace leaves the model and the process as they were, whatever the forward writes to, and also where it fails."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import StpFxError
from stp_fx.testing.untouched import assert_untouched, differences, snapshot


class Cache:
    def __init__(self) -> None:
        self.values: list[Any] = []


class Net(nn.Module):
    shared: list[Any] = []  # noqa: RUF012

    def __init__(self, write: Callable[[Net, torch.Tensor], object]) -> None:
        super().__init__()
        self.line, self.drop, self.write = nn.Linear(4, 4), nn.Dropout(), write
        self.feats: list[Any] = []
        self.grid, self.nested = {"old": 1}, {"a": [[1, 2], {"b": {3}}]}
        self.recent: deque[Any] = deque([1], maxlen=2)
        self.seen: set[Any] = set()
        self.cache, self.steps = Cache(), 0
        self.table = torch.zeros(4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.line(x))
        self.write(self, y)
        return y


def nested(net: Net, y: torch.Tensor) -> None:
    net.nested["a"][0].append(y)
    net.nested["a"][1]["b"] = y
    del net.grid["old"]


WRITES: dict[str, Callable[[Net, torch.Tensor], object]] = {
    "attribute": lambda net, y: setattr(net, "steps", y),
    "new attribute": lambda net, y: setattr(net, "fresh", y),
    "list": lambda net, y: net.feats.append(y),
    "dict": lambda net, y: net.grid.update(y=y),
    "nested": nested,
    "deque": lambda net, y: net.recent.extend([y, y]),
    "set": lambda net, y: net.seen.add(y),
    "object": lambda net, y: net.cache.values.append(y),
    "class": lambda net, y: net.shared.append(y),
    "plain tensor": lambda net, y: net.table.add_(1),
    "buffer by its dict": lambda net, y: net._buffers["count"].add_(1),
    "module": lambda net, y: net.add_module("more", nn.ReLU()),
    "hook": lambda net, y: net.line.register_forward_hook(lambda *_: None),
    "mode": lambda net, y: net.drop.eval(),
    "random": lambda net, y: (torch.rand(3), random.random()),
    "default dtype": lambda net, y: torch.set_default_dtype(torch.float64),
    "gradients": lambda net, y: torch.set_grad_enabled(False),
    "fails": lambda net, y: (net.feats.append(y), net.missing),
    "branches on data": lambda net, y: (net.feats.append(y), bool(y.sum() > 0)),
}


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    for frontend in ("fx", "export"):  # what is imported on demand may add filters of warnings
        stp_fx.trace(nn.Linear(2, 2), torch.randn(2, 2), frontend=frontend)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frontend", ["fx", "export", "auto"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_leaves_everything_as_it_was(write: str, training: bool, frontend: str) -> None:
    net, x = Net(WRITES[write]).train(training), torch.randn(2, 4)
    before = snapshot(net, x)
    with contextlib.suppress(StpFxError):
        stp_fx.trace(net, x, frontend=frontend)
    assert_untouched(before)


def test_what_a_hook_holds_is_restored() -> None:
    net, features = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU()), [1]
    net[0].register_forward_hook(lambda module, args, output: features.append(output))
    x = torch.randn(2, 4)
    before = snapshot(net)
    gm = stp_fx.trace(net, x)
    assert_untouched(before)
    assert features == [1]
    assert gm(torch.randn(2, 4)).shape == (2, 4)


def test_containers_that_are_written_to_are_named() -> None:
    gm = stp_fx.trace(Net(nested), torch.randn(2, 4))
    note = next(note for note in gm.meta["stp_fx"].notes if "assigns" in note)
    assert all(each in note for each in ("nested.a", "grid.old"))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.feats.append(1),
        lambda net: net.line.weight.data.add_(1),
        lambda net: net.nested["a"][1]["b"].add(4),
        lambda net: net.drop.eval(),
        lambda net: setattr(net.line, "weight", nn.Parameter(net.line.weight.detach().clone())),
        lambda net: torch.rand(1),
        lambda net: net.cache.values.append(2),
        lambda net: setattr(net, "fresh", 1),
        lambda net: delattr(net, "steps"),
        lambda net: net.line.register_forward_hook(lambda *_: None),
    ],
)
def test_the_law_sees_changes(change: Callable[[Net], object]) -> None:
    net = Net(lambda net, y: None)
    before = snapshot(net)
    assert differences(before) == []
    change(net)
    with pytest.raises(AssertionError, match="changed: "):
        assert_untouched(before)


def test_the_law_sees_changes_of_a_graph() -> None:
    gm = stp_fx.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), torch.randn(2, 4))
    before = snapshot(gm)
    stp_fx.prune_graph(gm, ratio=0.5)
    next(iter(gm.graph.nodes)).meta["new"] = 1
    assert any("graph" in line for line in differences(before))
