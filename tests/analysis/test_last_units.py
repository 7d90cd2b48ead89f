"""Plans that leave little: what they keep must be what removal finds in them again, and every op must still give numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.ir import provenance_of

X = torch.randn(2, 3, 6, 6)


class SlicedGroups(nn.Module):
    """Reads a part of what a grouped convolution gives: of its second group, all that is read may go while the group stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.b, self.c = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.b(F.relu(self.g(self.a(x)))[:, 3:7])))


class Standardised(nn.Module):
    """Divides by an unbiased deviation, which one channel has none of."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.a, self.b, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y / (y.std((1, 2, 3) if self.wide else 1, keepdim=True) + 0.1))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_a_plan_of_sliced_groups_is_read_as_it_was_made(ratio: float, scope: str) -> None:
    torch.manual_seed(0)
    gm = stp_fx.trace(SlicedGroups().eval(), X, validate=False)
    for seed in range(4):
        pruned = stp_fx.prune_graph(gm, "random", ratio, scope=scope, seed=seed)
        assert not provenance_of(pruned).validation.left_out
        plan = stp_fx.plan_of(pruned)
        assert stp_fx.plan_of(stp_fx.apply_plan(gm, plan)) == plan


def test_two_channels_of_an_unbiased_variance_stay() -> None:
    pruned = stp_fx.prune_graph(Standardised(wide=False), ratio=0.95, max_ratio=1.0, example_inputs=X)
    assert pruned.get_parameter("a.weight").shape[0] == 2
    assert bool(pruned(X).isfinite().all())
    pruned = stp_fx.prune_graph(Standardised(wide=True), ratio=0.95, max_ratio=1.0, example_inputs=X)
    assert pruned.get_parameter("a.weight").shape[0] == 1


def test_two_channels_stay_in_a_plan_by_hand() -> None:
    graph = stp_fx.analyze(stp_fx.trace(Standardised(wide=False), X))
    with pytest.raises(stp_fx.errors.StpFxError):
        graph.plan_for({"a": list(range(7))})
    assert graph.plan_for({"a": [0, 1, 2, 5, 6, 7]}).kept[("a.weight", 0)].tolist() == [3, 4]


def test_a_tensor_without_channels_adds_none() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(torch.cat([torch.empty(y.shape[0], 0, 6, 6), y], 1))

    pruned = stp_fx.prune_graph(Joined(), ratio=0.5, example_inputs=X)
    assert pruned.get_parameter("b.weight").shape[1] == 4
