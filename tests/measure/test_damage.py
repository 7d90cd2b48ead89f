"""Damage curves from one factorisation, against each number of units worked out by itself, and against data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stp_fx
from stp_fx.analysis.build import analyze
from stp_fx.analysis.consumers import find_consumers
from stp_fx.analysis.groups import Group
from stp_fx.errors import InputError
from stp_fx.measure.damage import damage_curves
from stp_fx.measure.statistics import collect_statistics


def batches(shape: tuple[int, ...] = (64, 4, 6, 6), number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(number)]


def captured(model: nn.Module, example: Tensor) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return stp_fx.trace(model.double().eval(), example)


def ranks(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


def one(gm: torch.fx.GraphModule, name: str) -> Group:
    return next(group for group in analyze(gm).groups if group.name == name)


def lost(covariance: Tensor, weight: Tensor, removed: np.ndarray) -> float:
    """The relative error of a layer's output once the kept inputs stand for the removed ones; ridge as in the curves."""
    damped = covariance + 1e-4 * torch.diag(covariance.diagonal())
    kept, gone = (torch.from_numpy(np.flatnonzero(flags)) for flags in (~removed, removed))
    rest = damped[gone][:, gone]
    if len(kept):
        rest = rest - damped[gone][:, kept] @ torch.linalg.solve(damped[kept][:, kept], damped[kept][:, gone])
    own = weight[:, gone]
    return float((own @ rest * own).sum() / (weight @ covariance * weight).sum())


@pytest.mark.parametrize("taps", [False, True])
def test_every_point_of_a_curve_is_the_error_of_the_best_reconstruction(taps: bool) -> None:
    gm = captured(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)), batches()[0])
    statistics = collect_statistics(gm, batches(), covariance=True, patches=1000 if taps else 0)
    rank = ranks(8)
    (curve,) = damage_curves(gm, statistics, [one(gm, "0.weight:0")], [rank])
    weight = gm.get_parameter("2.weight").detach()
    consumer = next(each for each in find_consumers(gm) if each.weight == "2.weight")
    if taps:
        covariance, matrix = statistics.patches[consumer.node].covariance, weight.reshape(5, -1)
    else:
        covariance, matrix = statistics.of(consumer.site).covariance, weight.permute(0, 2, 3, 1).reshape(-1, 8)
    assert covariance is not None
    assert curve.shape == (9,)
    assert curve[0] == 0
    for k in range(1, 9):
        removed = np.repeat(rank < k, 9 if taps else 1)
        assert curve[k] == pytest.approx(lost(covariance, matrix, removed), rel=1e-8)


def test_a_curve_is_the_error_that_least_squares_leaves_on_the_data() -> None:
    gm = captured(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)), batches((400, 6))[0])
    data = torch.cat(batches((400, 6)))
    statistics = collect_statistics(gm, [data], covariance=True)
    rank = ranks(12)
    (curve,) = damage_curves(gm, statistics, [one(gm, "0.weight:0")], [rank])
    with torch.no_grad():
        hidden = F.relu(F.linear(data, gm.get_parameter("0.weight"), gm.get_parameter("0.bias")))
        out = F.linear(hidden, gm.get_parameter("2.weight"))
    hidden, out = hidden - hidden.mean(0), out - out.mean(0)
    for k in (1, 4, 9, 11):
        kept = hidden[:, torch.from_numpy(np.flatnonzero(rank >= k))]
        fitted = kept @ torch.linalg.lstsq(kept, out).solution
        assert curve[k] == pytest.approx(float((out - fitted).square().sum() / out.square().sum()), rel=5e-3)


def test_layers_that_read_one_group_are_added_up() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.first(x))
            return self.left(x), self.right(x)

    gm = captured(Two(), batches((200, 6))[0])
    statistics = collect_statistics(gm, batches((200, 6)), covariance=True)
    rank = ranks(8)
    (curve,) = damage_curves(gm, statistics, [one(gm, "first.weight:0")], [rank])
    covariance = statistics.of(find_consumers(gm)[-1].site).covariance
    assert covariance is not None
    for k in (2, 5, 8):
        both = sum(lost(covariance, gm.get_parameter(f"{side}.weight").detach(), rank < k) for side in ("left", "right"))
        assert curve[k] == pytest.approx(both, rel=1e-8)
    assert curve[8] == pytest.approx(2.0, rel=1e-3)


def test_inputs_of_other_convolution_groups_absorb_nothing() -> None:
    """Twin channels in two groups of a convolution: neither can stand for the other."""
    gm = captured(nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)), batches()[0])
    with torch.no_grad():
        gm.get_parameter("0.weight")[4:] = gm.get_parameter("0.weight")[:4]
        gm.get_parameter("0.bias")[4:] = gm.get_parameter("0.bias")[:4]
    statistics = collect_statistics(gm, batches(), covariance=True)
    groups = [group for group in analyze(gm).groups if any(m.axis.tensor == "0.weight" for m in group.members)]
    curves = damage_curves(gm, statistics, groups, [ranks(group.size) for group in groups])
    assert any(curve[1] > 0.01 for curve in curves)


def test_a_head_is_lost_with_all_its_positions() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (each.reshape(*x.shape[:2], 3, 4).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    gm = captured(Attention(), batches((16, 5, 12))[0])
    statistics = collect_statistics(gm, batches((16, 5, 12)), covariance=True)
    heads = next(group for group in analyze(gm).groups if group.size == 3)
    (curve,) = damage_curves(gm, statistics, [heads], [np.array([1, 0, 2])])
    consumer = next(each for each in find_consumers(gm) if each.weight == "out.weight")
    covariance = statistics.of(consumer.site).covariance
    assert covariance is not None
    removed = np.repeat(np.array([1, 0, 2]) < 1, 4)
    assert curve[1] == pytest.approx(lost(covariance, gm.get_parameter("out.weight").detach(), removed), rel=1e-8)


def test_a_constant_input_costs_nothing() -> None:
    """Its mean goes into the bias."""
    gm = captured(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), batches((64, 6))[0])
    with torch.no_grad():
        gm.get_parameter("0.weight")[2] = 0.0
        gm.get_parameter("0.bias")[2] = 1.0
    statistics = collect_statistics(gm, batches((64, 6)), covariance=True)
    (curve,) = damage_curves(gm, statistics, [one(gm, "0.weight:0")], [np.array([1, 2, 0, 3])])
    assert curve[1] == 0
    assert curve[2] > 0


def test_covariances_are_needed() -> None:
    gm = captured(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), batches((64, 6))[0])
    with pytest.raises(InputError, match="collect them with covariance=True"):
        damage_curves(gm, collect_statistics(gm, batches((64, 6))), [one(gm, "0.weight:0")], [ranks(4)])
