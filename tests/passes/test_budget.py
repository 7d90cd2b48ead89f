"""Budgets, comparisons across groups, sweeps, sensitivity and the report of a run."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

import stp_fx
from stp_fx.analysis.isomorphism import isomorphism_classes
from stp_fx.errors import InputError
from stp_fx.passes import (
    CollectStatistics,
    CompensateMean,
    LatencyModel,
    MaskChannels,
    Pipeline,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
    latency_model,
)
from stp_fx.selection.estimate import mac_shares


class Net(nn.Module):
    """Two blocks of one structure and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(8, 12, 3, padding=1) for _ in range(2)])
        self.down = nn.ModuleList([nn.Conv2d(12, 8, 3, padding=1) for _ in range(2)])
        self.other, self.back = nn.Conv2d(8, 20, 1), nn.Conv2d(20, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down):
            x = x + down(F.relu(up(x)))
        return self.head((x + self.back(F.relu(self.other(x)))).mean((2, 3)))


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net().eval(), torch.randn(2, 3, 8, 8))


def _vision(name: str) -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(getattr(torchvision.models, name)().eval(), torch.randn(1, 3, 224, 224))


def test_groups_of_one_structure_are_one_class(gm: fx.GraphModule) -> None:
    graph = stp_fx.analyze(gm)
    classes = dict(zip([g.name for g in graph.groups], isomorphism_classes(graph.groups, graph.shapes), strict=True))
    assert classes["up.0.weight:0"] == classes["up.1.weight:0"]
    assert len(set(classes.values())) == len(classes) - 1


def test_isomorphic_scope_compares_within_a_structure(gm: fx.GraphModule) -> None:
    with torch.no_grad():
        gm.get_parameter("up.1.weight").mul_(100)
        gm.get_parameter("down.1.weight").mul_(100)
    pruned = stp_fx.prune_graph(gm, ratio=0.25, scope="isomorphic")
    assert pruned.get_parameter("up.0.weight").shape[0] == 6  # all six of the pair's 24 come from the weak one
    assert pruned.get_parameter("up.1.weight").shape[0] == 12
    assert pruned.get_parameter("other.weight").shape[0] == 15


def test_isomorphic_scope_takes_others_where_a_group_may_lose_no_more(gm: fx.GraphModule) -> None:
    with torch.no_grad():
        gm.get_parameter("up.1.weight").mul_(100)
        gm.get_parameter("down.1.weight").mul_(100)
    pruned = stp_fx.prune_graph(gm, ratio=0.5, max_ratio=0.75, scope="isomorphic", ignore=["stem"])
    assert [pruned.get_parameter(f"up.{k}.weight").shape[0] for k in (0, 1)] == [3, 9]


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("target", ["macs", "params"])
def test_costs_are_met_within_one_unit(gm: fx.GraphModule, scope: str, target: str) -> None:
    before = getattr(stp_fx.cost(gm), target)
    pruned = stp_fx.prune_graph(gm, ratio=0.4, scope=scope, target=target)
    graph = stp_fx.analyze(gm)
    gone = _removed(gm, stp_fx.plan_of(pruned))
    after = getattr(stp_fx.cost(pruned), target)
    assert after <= 0.6 * before
    closest = []
    for unit in np.flatnonzero(gone):
        less = gone.copy()
        less[unit] = False
        closest.append(getattr(graph.survivors_without(less), target))
    assert max(closest) > 0.6 * before  # giving back a unit would miss it


def _removed(gm: fx.GraphModule, plan: stp_fx.PrunePlan) -> np.ndarray:
    return ~stp_fx.analyze(gm).survivors(plan).units


def test_rounding_keeps_the_best_of_what_is_left() -> None:
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(20.0)[:, None].expand(20, 4) + 1)
        net[2].weight.fill_(1e-3)
    pruned = stp_fx.prune_graph(net, ratio=0.5, round_to=8, example_inputs=torch.randn(1, 4))
    assert stp_fx.plan_of(pruned).kept["0.weight", 0].tolist() == list(range(4, 20))


class Chunked(nn.Module):
    """16 channels in four pieces of four, put together in reverse; the last four have the best scores."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        with torch.no_grad():
            self.wide.weight.mul_(torch.tensor([1e-3, 1e-2, 1e-1, 1.0]).repeat_interleave(4)[:, None, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = torch.relu(self.wide(x)).chunk(4, 1)
        return self.head(torch.cat(pieces[::-1], 1).mean((2, 3)))


def test_pieces_keep_a_position_within_round_to_and_the_budget() -> None:
    torch.manual_seed(0)
    gm = stp_fx.trace(Chunked().eval(), torch.randn(1, 3, 8, 8))
    pruned = stp_fx.prune_graph(gm, ratio=0.75, target="macs", round_to=4)
    assert pruned.get_parameter("wide.weight").shape[0] == 4
    assert {position // 4 for position in stp_fx.plan_of(pruned).kept["wide.weight", 0].tolist()} == {0, 1, 2, 3}
    assert stp_fx.cost(pruned).macs <= 0.25 * stp_fx.cost(gm).macs
    report = stp_fx.report_of(pruned)
    assert report is not None
    assert any("the last unit of a piece of a tensor is kept" in each and "'wide.weight:0'" in each for each in report.notes)
    assert all(each[:60] in str(report) for each in report.notes)
    assert report.to_dict()["notes"] == list(report.notes)


def test_two_ratios_for_one_group_are_an_error(gm: fx.GraphModule) -> None:
    with pytest.raises(InputError, match=r"'stem' the ratio 0\.5 and 'back' the ratio 0\.25, but both are of the group"):
        stp_fx.prune_graph(gm, ratios={"stem": 0.5, "back": 0.25})
    pruned = stp_fx.prune_graph(gm, ratio=0, ratios={"stem": 0.5, "back": 0.5})
    assert pruned.get_parameter("back.weight").shape[0] == 4


@pytest.mark.parametrize(("name", "tolerance"), [("resnet18", 0.03), ("vgg11", 0.03), ("mobilenet_v2", 0.05)])
def test_the_closed_form_is_near_the_exact_answer(name: str, tolerance: float) -> None:
    gm = _vision(name)
    for target in (0.75, 0.5, 0.25):
        keep = stp_fx.estimate_keep_ratio(gm, target)
        achieved = stp_fx.cost(stp_fx.prune_graph(gm, "random", 1 - keep)).macs / stp_fx.cost(gm).macs
        assert achieved == pytest.approx(target, abs=tolerance)


def test_the_closed_form_is_linear_where_one_axis_is_pruned() -> None:
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    gm = stp_fx.trace(net, torch.randn(1, 6))
    assert (mac_shares(gm).fixed, mac_shares(gm).linear, mac_shares(gm).quadratic) == (0, 100, 0)
    assert stp_fx.estimate_keep_ratio(gm, 0.3) == pytest.approx(0.3)
    assert stp_fx.estimate_keep_ratio(gm, 1.0) == 1.0
    for wrong in (0.0, 1.5, "half"):
        with pytest.raises(InputError, match="mac_target"):
            stp_fx.estimate_keep_ratio(gm, wrong)  # type: ignore[arg-type]


def test_latency_target_meets_what_the_model_predicts(gm: fx.GraphModule) -> None:
    graph = stp_fx.analyze(gm)
    names = [n.name for n in gm.graph.nodes if n.op == "call_module"]
    linear = LatencyModel({n: np.array([0.0, 1.0]) for n in names}, {n: np.array([0.0, 1.0]) for n in names})
    select = SelectUnits(0.5, target="latency", cost=lambda removed: linear.predict(graph.survivors_without(removed)))
    pruned = Pipeline(ScoreUnits(), select, RemoveChannels())(gm).graph_module
    survivors = graph.survivors(stp_fx.plan_of(pruned))
    whole, left = linear.predict(graph.survivors()), linear.predict(survivors)
    assert whole == len(names)
    assert 0.4 * whole < left <= 0.5 * whole
    assert left == pytest.approx(sum(survivors.work_left()[n] for n in names))


def test_latency_is_measured_and_smaller_for_less(gm: fx.GraphModule) -> None:
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    flags = [m.training for m in gm.modules()]
    ticks = iter(range(10**6))
    model = latency_model(gm, clock=lambda: float(next(ticks)))
    graph = stp_fx.analyze(gm)
    assert model.predict(graph.survivors()) == pytest.approx(1.0)  # one tick a call
    assert all(torch.equal(before[k], v) for k, v in gm.state_dict().items())
    assert [m.training for m in gm.modules()] == flags
    wide = stp_fx.trace(nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256)), torch.randn(64, 256))
    graph, timed = stp_fx.analyze(wide), latency_model(wide)
    gone = np.zeros(graph.units, dtype=bool)
    gone[: graph.units * 3 // 4] = True
    full, quarter = (timed.predict(graph.survivors_without(g)) for g in (np.zeros_like(gone), gone))
    assert quarter < 0.8 * full


def test_budgets_out_of_reach_say_what_is(gm: fx.GraphModule) -> None:
    with pytest.raises(InputError, match="smallest in reach"):
        stp_fx.prune_graph(gm, ratio=0.99, target="macs", max_ratio=0.3)


def test_sweep_plans_many_ratios_without_removing(gm: fx.GraphModule) -> None:
    found = stp_fx.sweep(gm, [0.25, 0.5], scope="global")
    for entry in found.entries:
        direct = stp_fx.prune_graph(gm, ratio=entry.ratio, scope="global")
        assert entry.plan == stp_fx.plan_of(direct)
        assert entry.report.macs[1] == stp_fx.cost(direct).macs
        assert entry.report.params[1] == stp_fx.cost(direct).params
    assert "0.25" in str(found)
    with pytest.raises(InputError, match="empty"):
        stp_fx.sweep(gm, [])
    with pytest.raises(InputError, match="scope"):
        stp_fx.sweep(gm, [0.5], scope="worldwide")


def test_sensitivity_masks_one_group_alone(gm: fx.GraphModule, tmp_path: Any) -> None:
    data = [(torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))) for _ in range(2)]
    found = stp_fx.sensitivity(gm, data, ratios=(0.25, 0.75))
    assert set(found.losses) == {g.name for g in stp_fx.analyze(gm).groups}
    only = stp_fx.prune_graph(gm, ratio=0.0, ratios={"other": 0.75})
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(only), mask=True)
    with torch.no_grad():
        expected = np.mean([float(F.cross_entropy(masked(x), y)) for x, y in data])
        plain = np.mean([float(F.cross_entropy(gm(x), y)) for x, y in data])
    assert found.losses["other.weight:0"][1] == pytest.approx(expected)
    assert found.baseline == pytest.approx(plain)
    assert "other.weight:0" in str(found)
    pytest.importorskip("matplotlib", reason="plots need the demo extra")
    assert found.plot(tmp_path / "curves.png").stat().st_size > 1000


def test_the_report_of_a_run(gm: fx.GraphModule, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stp_fx.report"):
        pruned = stp_fx.prune_graph(gm, ratio=0.5)
    report = stp_fx.report_of(pruned)
    assert report is not None
    assert {g.name: (g.removed, g.size) for g in report.groups}["up.0.weight:0"] == (6, 12)
    assert report.macs == (stp_fx.cost(gm).macs, stp_fx.cost(pruned).macs)
    assert report.params == (stp_fx.cost(gm).params, stp_fx.cost(pruned).params)
    assert "graph output" in report.pinned
    assert "Prune 6/12 channels of up.0.weight:0" in caplog.text
    assert "axes pinned: graph output" in str(report)
    assert stp_fx.report_of(copy.deepcopy(pruned)) == report
    assert stp_fx.report_of(gm) is None


@pytest.mark.parametrize(("rewrite", "verb"), [(MaskChannels(), "Mask"), (RemoveChannels(), "Prune")])
def test_compensation_is_marked_on_both_paths(
    gm: fx.GraphModule, rewrite: Any, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    collect = CollectStatistics([torch.randn(2, 3, 8, 8)], maps=True)
    with caplog.at_level(logging.INFO, logger="stp_fx.report"):
        result = Pipeline(collect, ScoreUnits(), SelectUnits(), CompensateMean(), rewrite)(gm).graph_module
    assert f"{verb} 6/12 channels of up.0.weight:0 [mean]" in caplog.text
    report = stp_fx.report_of(result)
    assert report is not None
    assert report.compensation == "mean"
