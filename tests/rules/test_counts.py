"""Numbers computed from channel counts: in arithmetic and in conditions they keep their value and follow batch and image."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import stp_fx

from .oracles import Between, C, checked, eager_without

X = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.randn(2, 3, 8, 16), torch.randn(5, 3, 12, 9)]
Call = Callable[[torch.Tensor], torch.Tensor]

ARITHMETIC: dict[str, Call] = {
    "floor and power": lambda y: y * (y.shape[1] // 6) ** -0.5,
    "division by a quotient": lambda y: y / (y.shape[1] // 5),
    "division by a difference": lambda y: y / (y.shape[1] - 4),
    "remainder of a difference": lambda y: y * (y.shape[1] % (y.shape[1] - 4) + 1),
    "logarithm of a difference": lambda y: y * math.log(y.shape[1] - 4),
    "root of a difference": lambda y: y * math.sqrt(y.shape[1] - 6),
    "power in a tuple": lambda y: y * divmod(y.shape[1], y.shape[1] - 4)[0],
    "negative power of size()": lambda y: y * (y.size(1) // 6) ** -1,
    "negative power of size() unpacked": lambda y: y * (y.size()[1] // 6) ** -1,
    "nelement": lambda y: y / y.nelement(),
    "numel": lambda y: y / y.numel(),
    "torch.numel": lambda y: y / torch.numel(y),
    "shape.numel": lambda y: y / y.shape.numel(),
    "numel of a part of a shape": lambda y: y / y.shape[1:].numel(),
    "product of a shape": lambda y: y / math.prod(y.shape),
    "product of a part of a shape": lambda y: y / math.prod(y.shape[1:]),
    "product of a joined shape": lambda y: y / math.prod((*y.shape[:2], 3)),
    "sum of a part of a shape": lambda y: y / sum(y.shape[1:]),
    "stride": lambda y: y / y.stride(0),
    "channels times rows": lambda y: y / (y.shape[1] * y.shape[2]),
    "channels times rows, halved": lambda y: y / (y.shape[1] * y.shape[2] // 2),
    "flattened": lambda y: y / y.flatten(1).shape[1],
    "batch times channels": lambda y: y / y.flatten(0, 1).shape[0],
    "joined to rows": lambda y: y / torch.cat([y.mean((2, 3)), y.mean((1, 3))], 1).shape[1],
    "added to rows": lambda y: y / (y.shape[1] + y.shape[-1]),
}


@pytest.mark.parametrize("call", ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_a_number_in_arithmetic_stays_as_it_was(call: Call) -> None:
    checked(Between(call), X)


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_a_number_that_the_removal_makes_zero(ratio: float) -> None:
    checked(Between(lambda y: y * (y.shape[1] // 6) ** -0.5), X, ratio)


# -- conditions --------------------------------------------------------------------------------------------------------


def _rows(y: torch.Tensor) -> torch.Tensor:
    return y if y.shape[-2] > y.shape[1] - 1 else y.sin()


CONDITIONS: dict[str, tuple[Call, list[torch.Tensor]]] = {
    "channels alone": (lambda y: y if y.shape[1] > 6 else y.sin(), X),
    "channels are even": (lambda y: y if y.shape[1] % 8 == 0 else y.sin(), X),
    "more rows than channels": (_rows, X),
    "largest of a shape": (lambda y: y / max(y.shape[1:]), [X[0], X[1]]),
    "a whole shape": (lambda y: y if tuple(y.shape[1:]) == (C, 8, 8) else y.sin(), [X[0], X[1]]),
}


@pytest.mark.parametrize(("call", "inputs"), CONDITIONS.values(), ids=CONDITIONS.keys())
def test_a_branch_stays_right(call: Call, inputs: list[torch.Tensor]) -> None:
    checked(Between(call), inputs)


class Order(nn.Module):
    """Which of two orders of products is used depends on the sequence length and on the head dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 48), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.q(x).chunk(3, -1))
        a = q @ k.mT
        return self.o(((a.tanh() if v.shape[-2] > v.shape[-1] else a.sin()) @ v).transpose(1, 2).flatten(2))


def test_a_guard_over_the_head_dimension_is_right_or_refuses() -> None:
    net = Order().double().eval()
    gm = stp_fx.trace(net, torch.randn(2, 5, 4).double())
    pruned = stp_fx.prune_graph(gm, stp_fx.criteria.Random(seed=0), 0.5, products="inner")
    eager = eager_without(net, stp_fx.plan_of(pruned))
    for length in (5, 6, 9):
        x = torch.randn(3, length, 4).double()
        torch.testing.assert_close(pruned(x), eager(x), rtol=0, atol=1e-9)
    for length in (2, 3, 4):  # of the other branch
        with pytest.raises(AssertionError, match="traced for another shape"):
            pruned(torch.randn(3, length, 4).double())
