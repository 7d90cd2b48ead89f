"""A group is called exact only where masking its channels is removing them, sums inside one graph node included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx


class Two(nn.Module):
    """``call`` of two activations of 8 channels, down to one number a row."""

    def __init__(self, call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o, self.call = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(1, 3), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.call(torch.relu(self.a(x)), torch.relu(self.b(x)))
        return self.o(y.expand(x.shape[0]).unsqueeze(-1))


class OwnSoftmax(nn.Module):
    """A module without parameters whose forward asks for ``self.training`` stays one call."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = F.dropout(x, 0.1)
        e = x.exp()
        return (e / e.sum(-1, keepdim=True) * y).sum(-1)


class OwnProduct(OwnSoftmax):
    """The same, of values that are zero where its operands are."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = F.dropout(x, 0.1)
        return ((x.abs() * 2).sqrt() - y.relu().pow(2) / 3).clone().sum(-1)


class OwnExponential(OwnSoftmax):
    """It writes into its operand."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = F.dropout(x, 0.1)
        x.exp_()
        return torch.maximum(x, y.exp()).sum(-1)


class Hooked(nn.Module):
    """A forward hook that sums."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.a.register_forward_hook(lambda module, inputs, out: out / out.exp().sum(-1, keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def loss(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda u, v: function(u, v, reduction="sum")


INEXACT: dict[str, Callable[[], nn.Module]] = {
    "pairwise_distance": lambda: Two(lambda u, v: F.pairwise_distance(u, v, eps=0.1)),
    "pairwise_distance of order one": lambda: Two(lambda u, v: F.pairwise_distance(u, v, 1.0)),
    "PairwiseDistance": lambda: Two(nn.PairwiseDistance(eps=0.1)),
    "nanmean": lambda: Two(lambda u, v: torch.nanmean(u * v, -1)),
    "binary_cross_entropy_with_logits": lambda: Two(lambda u, v: loss(F.binary_cross_entropy_with_logits)(u, v.sigmoid())),
    "soft_margin_loss": lambda: Two(loss(F.soft_margin_loss)),
    "poisson_nll_loss": lambda: Two(loss(F.poisson_nll_loss)),
    "a composite module": lambda: Two(OwnSoftmax()),
    "a module that writes into its operand": lambda: Two(OwnExponential()),
    "a forward hook": Hooked,
}

EXACT: dict[str, Callable[[], nn.Module]] = {
    "mse_loss": lambda: Two(loss(F.mse_loss)),
    "l1_loss": lambda: Two(loss(F.l1_loss)),
    "normalize": lambda: Two(lambda u, v: (F.normalize(u, dim=-1) * v).sum(-1)),
    "cosine_similarity": lambda: Two(F.cosine_similarity),
    "matmul": lambda: Two(lambda u, v: torch.matmul(u.unsqueeze(1), v.unsqueeze(2)).flatten()),
    "einsum": lambda: Two(lambda u, v: torch.einsum("bi,bi->b", u, v)),
    "a composite module": lambda: Two(OwnProduct()),
}


@torch.no_grad()
def pruned(net: nn.Module) -> tuple[stp_fx.ChannelGraph, float]:
    """The analysis, and how far masked and removed are apart."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    net, x = net.double().eval(), torch.randn(5, 4).double()
    gm = stp_fx.trace(net, x)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, stp_fx.criteria.Random(seed=0), 0.5))
    assert ("a.weight", 0) in plan.kept
    masked, removed = (stp_fx.apply_plan(gm, plan, mask=mask)(x) for mask in (True, False))
    return stp_fx.analyze(gm), float((masked - removed).abs().max())


@pytest.mark.parametrize("build", INEXACT.values(), ids=INEXACT.keys())
def test_a_sum_of_what_no_mask_reaches_is_inexact(build: Callable[[], nn.Module]) -> None:
    graph, apart = pruned(build())
    assert apart > 1e-9
    assert not any(group.exact for group in graph.groups)
    assert any("where no mask reaches" in note for group in graph.groups for note in group.notes)


@pytest.mark.parametrize("build", EXACT.values(), ids=EXACT.keys())
def test_a_sum_of_what_masks_make_zero_is_exact(build: Callable[[], nn.Module]) -> None:
    graph, apart = pruned(build())
    assert apart < 1e-12
    assert all(group.exact for group in graph.groups), [group.notes for group in graph.groups]


# -- effects -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("stp_effects::flip_into", mutates_args={"out"})
def flip_into(x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes ``x`` with its channels in another order."""
    out.copy_(x.flip(1))


def _flip_named(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.flip(1))


_LIBRARY = torch.library.Library("stp_effects", "FRAGMENT")
_LIBRARY.define("flip_named(*, Tensor x, Tensor(a!) out) -> ()")
_LIBRARY.impl("flip_named", _flip_named, "CPU")
_LIBRARY.impl("flip_named", lambda x, out: None, "Meta")


@torch.library.custom_op("stp_effects::flip_and_count", mutates_args={"out"})
def flip_and_count(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The same, with a result."""
    out.copy_(x.flip(1))
    return x.new_ones(1)


@flip_and_count.register_fake
def _(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return x.new_ones(1)


class Writes(nn.Module):
    """An op that writes into one of its operands."""

    def __init__(self, op: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.op = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.a(x), self.b(x)
        self.op(y, z)
        return self.c(z)


OPS: dict[str, tuple[str, Callable[..., Any], bool]] = {
    "without a result": ("stp_effects.flip_into.default", lambda y, z: torch.ops.stp_effects.flip_into(y, z), True),
    "by keyword": ("stp_effects.flip_named.default", lambda y, z: torch.ops.stp_effects.flip_named(x=y, out=z), True),
    "with a result": ("stp_effects.flip_and_count.default", lambda y, z: torch.ops.stp_effects.flip_and_count(y, z), True),
    "into a view": ("stp_effects.flip_into.default", lambda y, z: torch.ops.stp_effects.flip_into(y[:, :4], z[:, 4:]), False),
}


@pytest.mark.parametrize(("op", "call", "whole"), OPS.values(), ids=OPS.keys())
def test_an_op_with_an_effect_and_no_rule_pins_what_it_reads_and_writes(op: str, call: Callable[..., Any], whole: bool) -> None:
    graph = stp_fx.analyze(stp_fx.trace(Writes(call).eval(), torch.randn(2, 3, 4, 4)))
    assert list(graph.unknown) == [op]
    assert f"no rule for {op}" in graph.explain("a.weight:0")
    assert f"no rule for {op}" in graph.explain("b.weight:0")
    if whole:
        assert not graph.groups
