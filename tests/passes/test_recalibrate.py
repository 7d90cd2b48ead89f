"""BatchNorm statistics after pruning, the mean check, and taking masks out again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx import PrunePlan
from stp_fx.errors import InputError, PassError
from stp_fx.passes import (
    Artifacts,
    CollectStatistics,
    CompensateMean,
    MaskChannels,
    Pipeline,
    RecalibrateBatchNorm,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
    UnmaskChannels,
    UpdateBatchNormVariance,
    mean_check,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.d = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.b, self.nb = nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12, momentum=0.3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.d(F.relu6(self.na(self.a(x))))
        x = F.relu(self.nb(self.b(x)))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 3, 8, 8, dtype=torch.float64) * 2 + 1 for _ in range(3)]


@pytest.fixture
def gm(batches: list[torch.Tensor]) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    net = Net().double()
    net(batches[0])
    return stp_fx.trace(net.train(), batches[0])


@pytest.fixture
def made(gm: torch.fx.GraphModule, batches: list[torch.Tensor]) -> Artifacts:
    return Pipeline(CollectStatistics(batches, maps=True), ScoreUnits("random"), SelectUnits(0.5))(gm).artifacts


@pytest.fixture
def plan(made: Artifacts) -> PrunePlan:
    assert made.plan is not None
    return made.plan


def test_recalibrated_statistics_are_the_average_over_batches(
    gm: torch.fx.GraphModule, plan: PrunePlan, batches: list[torch.Tensor]
) -> None:
    pruned = RemoveChannels(plan)(gm).graph_module
    result = RecalibrateBatchNorm(batches)(pruned).graph_module
    norm, conv = result.get_submodule("na"), result.get_submodule("a")
    with torch.no_grad():
        values = [conv(x) for x in batches]
    assert torch.allclose(norm.running_mean, torch.stack([v.mean((0, 2, 3)) for v in values]).mean(0))
    assert torch.allclose(norm.running_var, torch.stack([v.var((0, 2, 3)) for v in values]).mean(0))
    assert int(norm.num_batches_tracked) == 3
    assert (norm.momentum, result.get_submodule("nb").momentum) == (0.1, 0.3)


def test_nothing_but_statistics_moves(gm: torch.fx.GraphModule, batches: list[torch.Tensor]) -> None:
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    result = RecalibrateBatchNorm(batches, limit=1)(gm).graph_module
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    moved = {k for k, v in result.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"{n}.{s}" for n in ("na", "nb") for s in ("running_mean", "running_var")}
    assert [m.training for m in result.modules()] == [m.training for m in gm.modules()]


def test_recalibration_says_what_is_wrong(gm: torch.fx.GraphModule, batches: list[torch.Tensor]) -> None:
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    with pytest.raises(InputError, match="no batch"):
        RecalibrateBatchNorm([])(gm)
    with pytest.raises(InputError, match="'na'"):
        RecalibrateBatchNorm([batches[0] * float("nan")])(gm)
    with pytest.raises(InputError, match="at least 1"):
        RecalibrateBatchNorm(batches, limit=0)
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    without = stp_fx.trace(nn.Linear(2, 2), torch.randn(2, 2))
    assert not RecalibrateBatchNorm([torch.randn(2, 2)])(without).modified


def test_variance_is_corrected_by_the_reports_formula(
    gm: torch.fx.GraphModule, made: Artifacts, plan: PrunePlan, batches: list[torch.Tensor]
) -> None:
    result = Pipeline(CompensateMean(), UpdateBatchNormVariance())(gm, made).graph_module
    gone = sorted(set(range(16)) - set(plan.kept["b.weight", 1].tolist()))
    gm.eval()
    with torch.no_grad():
        read = torch.cat([gm.get_submodule("d")(F.relu6(gm.get_submodule("na")(gm.get_submodule("a")(x)))) for x in batches])
    expected = gm.get_buffer("nb.running_var").clone()
    for i in range(12):
        for j in gone:
            expected[i] -= gm.get_parameter("b.weight")[i, j, 0, 0].detach() ** 2 * read[:, j].var(correction=0)
    floor = gm.get_buffer("nb.running_var") * 1e-3
    assert torch.allclose(result.get_buffer("nb.running_var"), torch.maximum(expected, floor))
    assert torch.equal(result.get_buffer("na.running_var"), gm.get_buffer("na.running_var"))
    with pytest.raises(InputError, match="floor"):
        UpdateBatchNormVariance(floor=0.0)
    with pytest.raises(PassError, match="plan"):
        UpdateBatchNormVariance()(stp_fx.trace(Net().double(), batches[0]))


def test_mean_check_sees_what_compensation_mends(
    gm: torch.fx.GraphModule, made: Artifacts, plan: PrunePlan, batches: list[torch.Tensor]
) -> None:
    compensated = CompensateMean()(gm, made).graph_module
    worst = {
        "none": mean_check(gm, RemoveChannels(plan)(gm).graph_module, batches),
        "mean": mean_check(gm, RemoveChannels(plan)(compensated).graph_module, batches),
        "masked": mean_check(gm, MaskChannels(plan)(compensated).graph_module, batches),
        "same": mean_check(gm, gm, batches),
    }
    first = {name: check.consumers[0] for name, check in worst.items()}
    assert first["none"].node == first["mean"].node == "b"
    assert first["none"].mean > 0.05
    assert first["mean"].mean < 1e-9
    assert worst["same"].worst == 0.0
    for one, other in zip(worst["mean"].consumers, worst["masked"].consumers, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-9)
        assert one.variance == pytest.approx(other.variance)
    assert "b" in str(worst["none"])
    assert "shift of the mean" in str(worst["none"])


def test_unmasking_gives_the_graph_back(gm: torch.fx.GraphModule, plan: PrunePlan, batches: list[torch.Tensor]) -> None:
    gm.eval()
    masked = MaskChannels(plan)(gm).graph_module
    assert stp_fx.cost(masked).macs < stp_fx.cost(gm).macs
    back = UnmaskChannels()(masked).graph_module
    assert torch.equal(back(batches[0]), gm(batches[0]))
    assert list(back.state_dict()) == list(gm.state_dict())
    assert stp_fx.cost(back).macs == stp_fx.cost(gm).macs
    assert not UnmaskChannels()(back).modified


def test_removing_what_is_masked_leaves_no_mask(gm: torch.fx.GraphModule, plan: PrunePlan, batches: list[torch.Tensor]) -> None:
    gm.eval()
    removed = RemoveChannels(plan)(gm).graph_module
    later = RemoveChannels(plan)(MaskChannels(plan)(gm).graph_module).graph_module
    assert torch.equal(later(batches[0]), removed(batches[0]))
    assert list(later.state_dict()) == list(removed.state_dict())
    assert stp_fx.cost(later) == stp_fx.cost(removed)
    again = stp_fx.prune_graph(later, "magnitude", 0.25)
    assert again(batches[0]).shape == (8, 4)


def test_training_does_not_revive_what_is_masked(gm: torch.fx.GraphModule, plan: PrunePlan, batches: list[torch.Tensor]) -> None:
    masked = MaskChannels(plan)(gm).graph_module.train()
    optimizer = torch.optim.AdamW(masked.parameters(), lr=0.05, weight_decay=0.1)
    for x in batches * 3:
        optimizer.zero_grad()
        masked(x).square().sum().backward()
        optimizer.step()
    masked.eval()
    removed = RemoveChannels(plan)(masked).graph_module
    assert torch.allclose(masked(batches[0]), removed(batches[0]), rtol=1e-9)
    gone = sorted(set(range(16)) - set(plan.kept["a.weight", 0].tolist()))
    assert float(masked.get_parameter("a.weight").grad[gone].abs().max()) == 0.0
