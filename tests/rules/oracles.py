"""The oracle of a removal: the original module in eager mode with what consumers read from removed channels zeroed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

import stp_fx

__all__ = ["Between", "C", "checked", "eager_without", "held_to_oracle"]

C = 8


class Between(nn.Module):
    """``call`` between a producer and a consumer; ``tanh`` keeps the zeros of a removed channel."""

    def __init__(self, call: Any, out: int = C, channels: int = C) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(out, 3, 3, padding=1), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.call(torch.tanh(self.a(x))))


def eager_without(net: nn.Module, plan: stp_fx.PrunePlan) -> nn.Module:
    """A copy of ``net`` in which every removed position of every parameter is zero."""
    eager = copy.deepcopy(net)
    for (name, dim), kept in plan.kept.items():
        tensor = dict(eager.named_parameters()).get(name)
        if tensor is not None:
            removed = [k for k in range(tensor.shape[dim]) if k not in kept.tolist()]
            tensor.data.index_fill_(dim, torch.tensor(removed), 0.0)
    return eager


def held_to_oracle(net: nn.Module, pruned: fx.GraphModule, gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> None:
    """Removed, masked and the eager module agree on every input, in eval and in train mode."""
    plan = stp_fx.plan_of(pruned)
    eager, masked = eager_without(net, plan), stp_fx.apply_plan(gm, plan, mask=True)
    for training in (False, True):
        for each in (eager, masked, pruned):
            each.train(training)
        for x in inputs:
            expected = eager(x)
            torch.testing.assert_close(pruned(x), expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(masked(x), expected, rtol=0, atol=1e-9)


def checked(
    net: nn.Module, inputs: Sequence[torch.Tensor], ratio: float = 0.5, seeds: int = 3, **options: Any
) -> stp_fx.PrunePlan:
    """Prunes with several random plans and holds each to the oracle on all inputs; returns the last plan."""
    torch.manual_seed(0)
    net = net.double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    gm = stp_fx.trace(net, inputs[0])
    plan = stp_fx.PrunePlan({}, {})
    for seed in range(seeds):
        pruned = stp_fx.prune_graph(gm, stp_fx.criteria.Random(seed=seed), ratio, **options)
        plan = stp_fx.plan_of(pruned)
        assert not plan.is_empty
        held_to_oracle(net, pruned, gm, inputs)
    return plan
