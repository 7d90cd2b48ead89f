"""What Python asks of a value while it is traced: the graph computes what the model does, or says for which inputs it holds."""

from __future__ import annotations

import copy
import functools
import io
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.ir import provenance_of

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1), f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.f(torch.relu(self.a(x))))


@functools.lru_cache
def factor(size: int) -> int:
    return 2 if size == 8 else 3


ASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "is_tensor": lambda y: y * 2 if torch.is_tensor(y) else y * 3,
    "type is": lambda y: y * 2 if type(y) is torch.Tensor else y,
    "type in": lambda y: y * 2 if type(y) in (torch.Tensor, nn.Parameter) else y,
    "type of a size": lambda y: y * 2 if type(y.shape[1]) is int else y,
    "type as a class": lambda y: y * 2 if isinstance(nn.Module, type) and type(nn.Module) is type else y,
    "type of three": lambda y: y * type("Two", (), {"value": 2})().value,
    "dict": lambda y: {8: y * 2}.get(y.shape[1], y),
    "in a set": lambda y: y * 2 if y.shape[2] in {8, 16} else y,
    "not in a set": lambda y: y * 2 if y.shape[2] not in {8, 16} else y,
    "in a tuple": lambda y: y * 2 if y.shape[2] in (8, 16) else y,
    "cached": lambda y: y * factor(y.shape[3]),
    "rows": lambda y: torch.stack([row.flip(-1) for row in y]),
    "rows of a row": lambda y: y + torch.stack([row.flip(-1) for row in y[0]]),
    "len": lambda y: y * (1 / len(y)),
    "root of len": lambda y: y / len(y) ** 0.5,
    "len of a row": lambda y: y / len(y[0, 0]),
    "float": lambda y: y / float(y.shape[0]),
    "int": lambda y: y / (int(y.shape[0]) + 1),
    "int times": lambda y: y.reshape(int(y.shape[0]) * 2, -1).reshape(y.shape),
    "int in an index": lambda y: y[: int(y.shape[0]) - 1].sum(0, keepdim=True) + y,
    "float of all": lambda y: y / float(y.shape[0] * y.shape[2]),
    "1009": lambda y: (y * 3000).remainder(1009) / 1000,
    "2018": lambda y: (y * 3000).clamp(max=2018) / 1000,
    "even": lambda y: y / (int(y.shape[0]) // 2 * 2),
    "a multiple": lambda y: y / (int(y.shape[0]) // 8 * 8 + 1),
    "remainder": lambda y: y / (int(y.shape[0]) % 8 + 1),
    "all of it": lambda y: y / int(y.numel()),
    "of a view": lambda y: y / int(y.reshape(-1, 8).shape[0]),
    "square of the batch": lambda y: y / int(y.shape[0]) ** 2,
}
BOUND = {"rows", "len", "root of len", "square of the batch", "even", "a multiple", "remainder"}
"""The graph is that of the example's batch."""


def agrees(gm: nn.Module, net: nn.Module, x: torch.Tensor) -> bool:
    """Whether the graph takes an input, on which it then gives what the model gives."""
    try:
        found = gm(x)
    except AssertionError as error:
        if "another shape" in str(error):
            return False
        raise
    assert torch.allclose(found, net(x), rtol=1e-12, atol=1e-12)
    return True


@pytest.mark.parametrize("asks", ASKS)
def test_the_graph_is_the_model_or_says_where_not(asks: str) -> None:
    torch.manual_seed(1)
    net = Net(ASKS[asks]).double().eval()
    expected = net(X)
    gm = stp_fx.trace(net, X, frontend="fx")
    assert torch.equal(net(X), expected)
    assert agrees(gm, net, X)
    assert agrees(gm, net, X[:1]) or asks in BOUND or asks == "int in an index"
    more = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    assert agrees(gm, net, more) is (asks not in BOUND)
    for shape in ((2, 3, 12, 12), (2, 3, 16, 8), (3, 3, 8, 12)):
        agrees(gm, net, torch.randn(shape, dtype=torch.float64))
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    assert agrees(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False), net, X)
    assert bool(provenance_of(gm).notes) is (asks in BOUND)


def test_sizes_that_are_multiples_of_the_prime() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(1009, 8), nn.Linear(8, 3)

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            y = self.head(self.words((i * 31) % self.words.weight.shape[0]))
            return y if self.words.weight.shape[0] == 1009 else -y

    net, x = Words(), torch.randint(0, 9999, (2, 5))
    gm = stp_fx.trace(net, x)
    assert provenance_of(gm).notes == ()
    for each in (x, torch.randint(0, 9999, (7, 5))):
        assert torch.equal(gm(each), net(each))


def test_noise_is_drawn_at_each_call() -> None:
    net = Net(lambda y: y + torch.randn(1, 8, 1, 1, dtype=y.dtype)).double()
    gm = stp_fx.trace(net, X)
    for each in (
        gm,
        copy.deepcopy(gm),
        torch.load(io.BytesIO(dumped(gm)), weights_only=False),
        stp_fx.prune_graph(gm, ratio=0.5),
    ):
        assert not torch.equal(each(X), each(X))
    torch.manual_seed(3)
    expected = net(X)
    torch.manual_seed(3)
    assert torch.equal(gm(X), expected)


def dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def multiplied_in_place(value: Any, by: Any) -> Any:
    value *= by
    return value


WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "alias": lambda y: augmented(y, 1) * y,
    "old value": lambda y: (y + 1) * augmented(y, 1) + y,
    "view": lambda y: (augmented(y[:, :4], 1), y)[1],
    "view of a view": lambda y: (augmented(y[:, :4].flatten(2)[..., 1:], 1), y)[1],
    "flat": lambda y: (multiplied_in_place(y.flatten(2), 3), y)[1],
    "other view": lambda y: (lambda v: (augmented(y[:, 1:5], 1), v * 2)[1])(y[:, :4].sum(1, keepdim=True) + y),
    "view before": lambda y: (lambda v: (augmented(y, 1), v.mean(1, keepdim=True) * y)[1])(y[:, :4]),
    "row": lambda y: (multiplied_in_place(y[0], 3), y)[1],
    "twice": lambda y: augmented(augmented(y, y), y[:, :4].sum()),
    "a number": lambda y: y + augmented(y.shape[1], 1),
    "a weight of a list": lambda y: y * augmented([1], [2])[1],
}


def augmented(value: Any, other: Any) -> Any:
    value += other
    return value


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("training", [True, False])
def test_augmented_assignments_write_in_place(writes: str, training: bool) -> None:
    torch.manual_seed(1)
    net = Net(lambda y: WRITES[writes](torch.sigmoid(y)))
    net.b = nn.LazyConv2d(3, 3, padding=1)
    net.double().train(training)(X)
    gm = stp_fx.trace(net, X, frontend="fx")
    again = torch.load(io.BytesIO(dumped(gm)), weights_only=False)
    for x in (X, torch.randn(5, 3, 8, 8, dtype=torch.float64)):
        for each in (gm, again):
            assert torch.equal(each(x.clone()), net(x.clone()))


def test_what_nobody_sees_stays_a_plain_operator() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x *= 2
            y = self.line(x)
            y += x
            return y

    gm = stp_fx.trace(Residual(), torch.randn(2, 4))
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [operator.mul, operator.add]
    x = torch.ones(2, 4)
    gm(x)
    assert torch.equal(x, torch.ones(2, 4))


JOINS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cat": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "named": lambda y: torch.cat(tensors=y.split(4, 1), dim=1),
    "stack": lambda y: torch.stack(y.chunk(2, 1), 2).flatten(1, 2),
    "hstack": lambda y: torch.hstack(y.chunk(2, 1)[::-1]),
    "grid": lambda y: (
        y * torch.stack(torch.meshgrid(*(torch.arange(n).type_as(y) for n in y.shape[2:]), indexing="ij")[::-1]).sum(0)
    ),
}


@pytest.mark.parametrize("name", JOINS)
def test_what_is_joined_may_be_a_node(name: str) -> None:
    net = Net(JOINS[name]).double()
    gm = stp_fx.trace(net, X, frontend="fx")
    assert torch.equal(gm(X), net(X))


class Masked(nn.Conv2d):
    """PixelCNN's convolution: what the mask forbids is set to zero in the weight itself, at each call."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        mask = torch.ones_like(self.weight.detach())
        mask[:, :, 2, 1:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


def test_weights_that_are_written_to() -> None:
    net = Net(Masked(8, 8, 3, padding=1)).double()
    expected = copy.deepcopy(net)(X)
    gm = stp_fx.trace(copy.deepcopy(net), X)
    assert torch.equal(gm(X), expected)
    gm = stp_fx.trace(copy.deepcopy(net), X)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert pruned.get_parameter("a.weight").shape[0] == 4
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    assert torch.allclose(pruned(X), masked(X), rtol=1e-9)
