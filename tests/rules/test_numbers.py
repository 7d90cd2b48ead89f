"""Numbers in calls of a pruned graph: sizes and positions of shortened axes are renewed, every other number stays as it was.

The oracle is the original module in eager mode with the rows of removed channels zeroed: ``tanh`` keeps them zero, so the
consumers read zero where channels are removed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx

C = 8


class Between(nn.Module):
    """``call`` between a producer and a consumer of 8 channels."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor], out: int = C) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(out, 3, 3, padding=1), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.call(torch.tanh(self.a(x))))


def written(y: torch.Tensor) -> torch.Tensor:
    z = y * 1.0
    z[:, :, 0] = y.shape[1] / 8 * y[:, :, 1]
    return z


def written_at(y: torch.Tensor) -> torch.Tensor:
    z = y * 1.0
    z[:, :, y.shape[1] // 2] = 2.0 * y[:, :, 1]
    return z


NOT_SIZES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "full, fill_value": lambda y: y / torch.full((1,), y.shape[1], dtype=y.dtype),
    "full, fill_value by name": lambda y: y / torch.full(fill_value=y.shape[1], size=(1,), dtype=y.dtype),
    "new_full, fill_value": lambda y: y / y.new_full((1,), y.shape[1]),
    "pad, value": lambda y: F.pad(y, (1, 1, 1, 1), value=y.shape[1] / 8),
    "pad, value and size": lambda y: F.pad(y, (y.shape[1] // 4, 1, 1, 1), value=y.shape[1] / 8),
    "setitem, value": written,
    "setitem, index": written_at,
    "getitem, another axis": lambda y: y * y[:, :, y.shape[1] // 2].unsqueeze(2),
    "getitem, slice of another axis": lambda y: y * y[:, :, : y.shape[1] // 4].mean(2, keepdim=True),
    "select, another axis": lambda y: y * y.select(2, y.shape[1] // 2).unsqueeze(2),
    "narrow, another axis": lambda y: y * y.narrow(2, y.shape[1] // 4, y.shape[1] // 4).mean(2, keepdim=True),
    "roll, another axis": lambda y: y + y.roll(y.shape[1] // 2 - 1, 2),
    "roll, another axis by name": lambda y: y + torch.roll(y, dims=2, shifts=y.shape[1] // 2 - 1),
    "roll, two axes": lambda y: y.roll((y.shape[1] // 4, 3), (2, 1)),
    "chunk, another axis": lambda y: torch.cat([t * (k + 1) for k, t in enumerate(y.chunk(y.shape[1] // 2, 2))], 2),
    "batch_norm, eps": lambda y: F.batch_norm(y, y.new_zeros(C), y.new_ones(C), eps=1 / y.shape[1], training=False),
    "layer_norm over rows, eps": lambda y: F.layer_norm(y, y.shape[2:], eps=1 / y.shape[1]),
    "leaky_relu, slope": lambda y: F.leaky_relu(y, 1 / y.shape[1]),
    "conv, padding": lambda y: F.conv2d(y, y.new_ones(C, 1, 3, 3), padding=y.shape[1] // 8, groups=y.shape[1]),
}

KEYWORDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "chunk": (lambda y: torch.mul(*torch.chunk(input=y, chunks=2, dim=1)), C // 2),
    "split": (lambda y: torch.mul(*torch.split(tensor=y, split_size_or_sections=C // 2, dim=1)), C // 2),
    "method split": (lambda y: torch.mul(*y.split(split_size=C // 2, dim=1)), C // 2),
    "narrow": (lambda y: torch.narrow(input=y, dim=1, start=2, length=4), 4),
    "reshape": (lambda y: torch.reshape(input=y, shape=(y.shape[0], C, 4, 16)), C),
    "method view": (lambda y: y.view(size=(y.shape[0], C, 4, 16)), C),
    "roll": (lambda y: torch.roll(input=y, shifts=3, dims=1), C),
    "select": (lambda y: y * torch.select(input=y, dim=1, index=3).unsqueeze(1), C),
    "pad": (lambda y: F.pad(input=y, pad=(0, 0, 0, 0, 1, 2)), C + 3),
    "expand": (lambda y: y.sum(1, keepdim=True).expand(size=(y.shape[0], C, 8, 8)) * y, C),
    "unflatten": (lambda y: torch.unflatten(input=y, dim=1, sizes=(2, 4)).flatten(1, 2), C),
    "cat": (lambda y: torch.cat(tensors=[y, y], dim=1), 2 * C),
    "channel_shuffle": (lambda y: F.channel_shuffle(input=y, groups=2), C),
}

ROLLS = {
    "twice on one axis": lambda y: torch.roll(y, (1, 2), (1, 1)),
    "twice on one axis, one of them from the end": lambda y: torch.roll(y, (1, 5), (1, -3)),
    "forth and back": lambda y: torch.roll(y, (3, -3), (1, 1)),
    "more than once around": lambda y: torch.roll(y, (7, 6), (1, 1)),
    "on both sides of another axis": lambda y: torch.roll(y, (1, 3, 2), (1, 2, 1)),
}


def check(net: nn.Module) -> stp_fx.Plan:
    """Prunes half of the channels and holds the result against the eager module; returns the plan."""
    torch.manual_seed(0)
    net, x = net.double().eval(), torch.randn(2, 3, 8, 8).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    gm = stp_fx.trace(net, x)
    pruned = stp_fx.prune_graph(gm, stp_fx.criteria.Random(seed=0), 0.5)
    plan = stp_fx.plan_of(pruned)
    eager = copy.deepcopy(net)
    for (name, dim), kept in plan.kept.items():
        tensor = eager.get_parameter(name)
        removed = [k for k in range(tensor.shape[dim]) if k not in kept.tolist()]
        tensor.data.index_fill_(dim, torch.tensor(removed), 0.0)
    torch.testing.assert_close(pruned(x), eager(x), rtol=0, atol=1e-9)
    assert ("a.weight", 0) in plan.kept
    return plan


@pytest.mark.parametrize("call", NOT_SIZES.values(), ids=NOT_SIZES.keys())
def test_numbers_that_are_no_sizes_stay_as_they_were(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(Between(call))


@pytest.mark.parametrize(("call", "out"), KEYWORDS.values(), ids=KEYWORDS.keys())
def test_operands_may_be_given_by_keyword(call: Callable[[torch.Tensor], torch.Tensor], out: int) -> None:
    check(Between(call, out))


@pytest.mark.parametrize("call", ROLLS.values(), ids=ROLLS.keys())
def test_shifts_along_one_axis_add_up(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(Between(call))


class SegNet(nn.Module):
    """Pools one map and unpools another by the indices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled, indices = F.max_pool2d(torch.tanh(self.a(x)), 2, return_indices=True)
        return self.c(F.max_unpool2d(torch.tanh(self.b(pooled)), indices, 2))


def test_unpooling_takes_the_channels_of_the_pool_that_made_its_indices() -> None:
    kept = check(SegNet()).kept
    assert kept["a.weight", 0].tolist() == kept["b.weight", 0].tolist()


class Attention(nn.Module):
    """GPT-2's scale: a tensor filled with a number from the head dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(*t.shape[:-1], 4, -1).transpose(1, 2) for t in self.qkv(x).split(16, dim=2))
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores / torch.full([], v.size(-1) ** 0.5, dtype=scores.dtype)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_scale_from_the_head_dimension_stays_as_it_was() -> None:
    torch.manual_seed(0)
    net, x = Attention().double().eval(), torch.randn(2, 5, 8).double()
    gm = stp_fx.trace(net, x)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, stp_fx.criteria.Random(seed=0), 0.5, products="inner"))
    assert plan.kept
    eager = copy.deepcopy(net)
    for (name, dim), kept in plan.kept.items():
        tensor = eager.get_parameter(name)
        removed = [k for k in range(tensor.shape[dim]) if k not in kept.tolist()]
        tensor.data.index_fill_(dim, torch.tensor(removed), 0.0)
    torch.testing.assert_close(stp_fx.apply_plan(gm, plan)(x), eager(x), rtol=0, atol=1e-9)
