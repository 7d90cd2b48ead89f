"""The oracles against networks cut by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stp_fx.selection import PrunePlan
from stp_fx.testing import OracleError, run_absent, run_silenced
from stp_fx.testing.laws import assert_same

KEEP = [0, 2, 5]


def plan(*axes: tuple[str, int], size: int = 6, keep: list[int] = KEEP) -> PrunePlan:
    return PrunePlan(dict.fromkeys(axes, keep), dict.fromkeys(axes, size))


def cut(module: nn.Module, kept: PrunePlan) -> nn.Module:
    """The module with every axis of the plan indexed, and nothing else renewed."""
    result = copy.deepcopy(module)
    named = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for (name, dim), indices in kept.kept.items():
        named[name].data = named[name].data.index_select(dim, torch.as_tensor(indices.copy()))
    return result


class Plain(nn.Module):
    """Sigmoid(0) is 0.5 and a norm's shift revives a zeroed channel: the oracle must not care."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(self.norm(self.a(x))))


NORM = [("norm.weight", 0), ("norm.bias", 0)]
STATS = [("norm.running_mean", 0), ("norm.running_var", 0)]
PLAIN = plan(("a.weight", 0), ("a.bias", 0), *NORM, *STATS, ("b.weight", 1))


@pytest.mark.parametrize("oracle", [run_absent, run_silenced])
def test_a_plain_network(oracle) -> None:
    net, x = Plain().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    smaller = cut(net, PLAIN)
    smaller.norm.num_features = 3
    assert_same(oracle(net, PLAIN, (x,)), smaller(x).detach(), "by hand")
    assert_same(dict(net.state_dict()), before, "the module given", tolerance=0.0)


class Normed(nn.Module):
    """A LayerNorm over what is pruned: only the absent-oracle knows what removal does here."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


def test_a_norm_over_what_is_pruned() -> None:
    net, x = Normed().double(), torch.randn(5, 4, dtype=torch.float64)
    kept = plan(("a.weight", 0), ("a.bias", 0), *NORM, ("b.weight", 1))
    smaller = cut(net, kept)
    smaller.norm.normalized_shape = (3,)
    assert_same(run_absent(net, kept, (x,)), smaller(x).detach(), "by hand")
    with pytest.raises(AssertionError):
        assert_same(run_silenced(net, kept, (x,)), smaller(x).detach(), "zeroed columns do not know of the norm")


class Products(nn.Module):
    """q and k meet without a weight; sums and softmax run over channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = torch.sigmoid(self.q(x)), self.k(x)
        if self.how == "matmul":
            return (q @ k.mT).softmax(-1)
        if self.how == "attention":
            return self.out(nn.functional.scaled_dot_product_attention(q, k, q * 2, scale=0.5))
        if self.how == "cdist":
            return torch.cdist(q, k)
        total = {
            "sum": q.sum(-1),
            "mean": k.mean(-1),
            "max": k.amax(-1),
            "std": k.std(-1),
            "softmax": (q.softmax(-1) * k).sum(-1),
        }
        return total[self.how].unsqueeze(-1) * self.out(q)


@pytest.mark.parametrize("how", ["matmul", "attention", "cdist", "sum", "mean", "max", "std", "softmax"])
def test_channels_that_no_weight_reads(how: str) -> None:
    net, x = Products(how).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    kept = plan(("q.weight", 0), ("q.bias", 0), ("k.weight", 0), ("k.bias", 0), ("out.weight", 1))
    assert_same(run_absent(net, kept, (x,)), cut(net, kept)(x).detach(), "by hand")


def test_a_plan_that_takes_an_output_is_noticed() -> None:
    net, x = Plain().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(OracleError, match="reaches the output"):
        run_absent(net, plan(("b.weight", 0), ("b.bias", 0), size=4, keep=[0, 2]), (x,))


def test_a_plan_that_couples_the_wrong_channels_is_noticed() -> None:
    class Flipped(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.norm(self.a(x)).flip(1))

    net, x = Flipped().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    smaller = cut(net, PLAIN)
    smaller.norm.num_features = 3
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(run_absent(net, PLAIN, (x,)), smaller(x).detach(), "flip is not pointwise")


def test_an_op_without_semantics_is_refused() -> None:
    class Sorted(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).sort(1).values)

    net, x = Sorted().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(OracleError, match=r"no semantics for aten\.sort"):
        run_absent(net, PLAIN, (x,))
