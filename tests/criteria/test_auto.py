"""``criterion="auto"``: every branch of its rule, on networks small enough to say which one it has to take."""

from __future__ import annotations

import logging
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from criteria_networks import Attention, ConvNet, Mlp, calibration, traced
from torch import Tensor, nn

import stp_fx
from stp_fx import passes
from stp_fx.criteria import Auto, Chosen, CostAware, Magnitude, Reconstruction, Variance
from stp_fx.errors import InputError
from stp_fx.passes import Pipeline
from stp_fx.passes.compensations import CompensationName

# network, what is given beside the ratio -> the criterion of the same name, and a part of the reason
BRANCHES: dict[str, tuple[type[nn.Module], dict[str, Any], str, str]] = {
    "no data": (ConvNet, {}, "magnitude", "no calibration data"),
    "norms go on": (ConvNet, {"calibration": True}, "magnitude", "BatchNorm keeps the statistics"),
    "norms go on, mean": (ConvNet, {"calibration": True, "compensation": "mean"}, "magnitude", "'mean', and BatchNorm"),
    "norms measured again": (ConvNet, {"calibration": True, "recalibrate": 1}, "variance", "and no compensation: nothing"),
    "no norms": (Mlp, {"calibration": True}, "variance", "and no compensation: nothing"),
    "layer norms": (Attention, {"calibration": True, "compensation": "mean"}, "variance", "'mean': nothing"),
    "least squares": (ConvNet, {"calibration": True, "compensation": "least_squares"}, "reconstruction", "take over"),
    "sequential": (Attention, {"calibration": True, "compensation": "sequential"}, "reconstruction", "take over"),
}


def prepared(kind: type[nn.Module], options: dict[str, Any]) -> tuple[torch.fx.GraphModule, dict[str, Any]]:
    data = calibration(kind, torch.float64) if options.get("calibration") else None
    return traced(kind, torch.float64), {**options, "calibration": data, "validate": False}


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_prunes_as_the_criterion_by_its_own_name(branch: str) -> None:
    kind, given, named, why = BRANCHES[branch]
    gm, options = prepared(kind, given)
    auto = stp_fx.prune_graph(gm, "auto", 0.5, scope="global", **options)
    plain = stp_fx.prune_graph(gm, named, 0.5, scope="global", **options)
    report, expected = stp_fx.report_of(auto), stp_fx.report_of(plain)
    assert report is not None
    assert expected is not None
    assert stp_fx.plan_of(auto).to_json() == stp_fx.plan_of(plain).to_json()
    assert report.groups == expected.groups  # scores included
    for name, value in plain.state_dict().items():
        assert torch.equal(auto.state_dict()[name], value)
    (note,) = set(report.notes) - set(expected.notes)
    assert note.startswith(f"criterion 'auto' is {named.capitalize()}: ")
    assert why in note
    assert note in str(report)
    assert note in report.to_dict()["notes"]


@pytest.mark.parametrize("criterion", [Magnitude(), Variance(), Reconstruction()])
def test_what_is_chosen_scores_as_itself_and_hands_its_fields_on(criterion: Any) -> None:
    repair = "sequential" if isinstance(criterion, Reconstruction) else None
    gm = traced(Attention, torch.float64)
    auto = Auto(repair, normalizer="max", reduction="max")
    chosen = auto.choose(gm, data=not isinstance(criterion, Magnitude))
    assert chosen.criterion == type(criterion)(normalizer="max", reduction="max")
    collected = Pipeline(passes.CollectStatistics(calibration(Attention, torch.float64), covariance=True))(gm).artifacts
    for given in (chosen, auto) if chosen.needs else (chosen,):
        scores = [stp_fx.criteria.score(gm, each, collected.measured) for each in (given, chosen.criterion)]
        assert all(torch.equal(a, b) for a, b in zip(scores[0].values, scores[1].values, strict=True))
        assert scores[0].notes == (chosen.note,)
        assert scores[1].notes == ()


class Skip(nn.Module):
    """The channels of ``first`` go to a norm, which the output reads position by position: nothing sums over ``scale``'s."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))) + self.table.amax(0).sum()


def test_a_group_that_nothing_reads_is_scored_by_weights() -> None:
    gm = stp_fx.trace(Skip().double(), torch.randn(2, 4, dtype=torch.float64))
    names = [group.name for group in stp_fx.analyze(gm).groups]
    unread = [n for n in names if n.startswith("table")]
    assert unread, "the network has no such group any more"
    chosen = Auto("sequential").choose(gm, data=True)
    assert isinstance(chosen.criterion, Magnitude)
    assert f"no contraction reads every unit of {unread[0]!r}" in chosen.why
    kept = Auto("sequential").choose(gm, data=True, ignore="table")
    assert isinstance(kept.criterion, Reconstruction)


class Uneven(nn.Module):
    """Two of the four units have two positions each in a product without weights, the others one; else they are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z = torch.cat([y, y[:, :2]], 1)
        return self.last(y) + (z[:, None] @ z[:, :, None]).squeeze(1)


def test_units_that_cannot_be_reconstructed_are_scored_by_variance() -> None:
    gm = stp_fx.trace(Uneven(), torch.randn(2, 4))
    chosen = Auto("least_squares").choose(gm, data=True)
    assert isinstance(chosen.criterion, Variance)
    assert "cannot be reconstructed one by one" in chosen.why
    data = [torch.randn(16, 4)]
    with pytest.raises(stp_fx.errors.CriterionError, match="do not divide the positions"):
        stp_fx.prune_graph(gm, "reconstruction", 0.5, calibration=data)
    pruned = stp_fx.prune_graph(gm, "auto", 0.5, calibration=data, compensation="least_squares")
    assert stp_fx.cost(pruned).params < stp_fx.cost(gm).params


def test_what_would_take_too_long_is_scored_by_variance() -> None:
    """The limit is one of the estimate: three layers that read 7 and 6 units are far below ten minutes."""
    gm = traced(Mlp, torch.float64)
    long = Auto("least_squares", longest=0.0).choose(gm, data=True)
    assert isinstance(long.criterion, Variance)
    assert "reconstruction would take about 0 s (longest: 0 s)" in long.why
    work = 1.4e-10 * (7**3 + 6**3)
    assert isinstance(Auto("least_squares", longest=work * 1.01).choose(gm, data=True).criterion, Reconstruction)
    assert isinstance(Auto("least_squares", longest=work * 0.99).choose(gm, data=True).criterion, Variance)


def test_a_wide_network_is_wide_whatever_its_weights() -> None:
    """Two layers of 16,384 units on the meta device: 4.4e12 multiplications each, beyond ten minutes; nothing is computed."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 16384), nn.ReLU(), nn.Linear(16384, 4))
        gm = stp_fx.trace(net, torch.empty(1, 8), validate=False)
    chosen = Auto("sequential").choose(gm, data=True)
    assert isinstance(chosen.criterion, Variance)
    assert "reconstruction would take about 616 s (longest: 600 s)" in chosen.why


class Counted:
    """Batches that count how often they are read from the start."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return iter(self.batches)


@pytest.mark.parametrize(
    ("kind", "options", "reads"),
    [
        (ConvNet, {}, 0),  # magnitude: what is there is not needed
        (Mlp, {}, 1),
        (ConvNet, {"compensation": "least_squares"}, 1),
        (ConvNet, {"compensation": "least_squares", "recalibrate": True}, 2),
    ],
)
def test_data_are_read_once_for_all_and_not_for_nothing(kind: type[nn.Module], options: dict[str, Any], reads: int) -> None:
    data = Counted(calibration(kind, torch.float64))
    stp_fx.prune_graph(traced(kind, torch.float64), "auto", 0.5, calibration=data, validate=False, **options)
    assert data.reads == reads


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stp_fx"):
        stp_fx.prune_graph(traced(Mlp, torch.float64), "auto", 0.5, validate=False)
    assert [r.message for r in caplog.records if "auto" in r.message] == [
        "criterion 'auto' is Magnitude: no calibration data, so weights alone are read"
    ]


def test_a_pass_goes_by_what_was_measured_before_it() -> None:
    gm, data = traced(Mlp, torch.float64), calibration(Mlp, torch.float64)
    found = {}
    for key, before, auto in [
        ("nothing", "", "'auto'"),
        ("statistics", "CollectStatistics(), ", "'auto'"),
        ("no covariance", "CollectStatistics(), ", "Auto('least_squares')"),
        ("covariance", "CollectStatistics(covariance=True), ", "Auto('least_squares')"),
    ]:
        arguments = {"calibration": data} if before else {}
        pipeline = Pipeline.parse(f"{before}ScoreUnits({auto}), SelectUnits(0.5)", **arguments)
        found[key] = pipeline(gm).artifacts.report.notes[0].split(":")[0].rpartition(" ")[2]
    assert found == dict(zip(found, ["Magnitude", "Variance", "Variance", "Reconstruction"], strict=True))


def test_a_pipeline_with_a_choice_can_be_read_back() -> None:
    chosen = Auto("sequential").choose(traced(Mlp, torch.float64), data=True)
    text = str(Pipeline(passes.ScoreUnits(chosen), passes.ScoreUnits(Auto("mean", recalibrated=True))))
    first, second = Pipeline.parse(text).passes
    assert first == passes.ScoreUnits(chosen)
    assert second == passes.ScoreUnits(Auto("mean", recalibrated=True))


def test_sweep_and_sensitivity_choose_before_they_measure() -> None:
    gm, data = traced(Mlp, torch.float64), Counted(calibration(Mlp, torch.float64))
    plain, plans = (stp_fx.sweep(gm, [0.3, 0.5], each, calibration=data) for each in ("variance", "auto"))
    assert [e.plan.to_json() for e in plans.entries] == [e.plan.to_json() for e in plain.entries]
    assert data.reads == 2
    assert all("is Variance: " in entry.report.notes[0] for entry in plans.entries)
    optimal = stp_fx.sweep(gm, [0.5], "auto", calibration=data, allocation="optimal")
    assert "is Reconstruction: compensation 'least_squares'" in optimal.entries[0].report.notes[0]
    own = stp_fx.sweep(gm, [0.5], Auto("sequential"), calibration=data)
    assert "is Reconstruction: compensation 'sequential'" in own.entries[0].report.notes[0]
    losses = [stp_fx.sensitivity(gm, data, ratios=(0.5,), criterion=each).losses for each in ("variance", "auto")]
    assert losses[0] == losses[1]


def test_pat_chooses_once_for_all_steps() -> None:
    def manager(**options: Any) -> stp_fx.PATPassManager:
        return stp_fx.PATPassManager(traced(ConvNet, torch.float32), criterion="auto", steps=2, validate=False, **options)

    loader = calibration(ConvNet, torch.float32)
    for options, kind in [
        ({}, Magnitude),
        ({"train_loader": loader}, Variance),  # training measures the norms' statistics again
        ({"train_loader": loader, "compensation": "least_squares"}, Reconstruction),
    ]:
        pat = manager(**options)
        assert isinstance(pat.criterion, Chosen)
        assert isinstance(pat.criterion.criterion, kind)
        before = pat.criterion
        for epoch in range(2):
            assert pat.prune(epoch)
            assert pat.criterion is before
            report = stp_fx.report_of(pat.model)
            assert report is not None
            assert before.note in report.notes
        assert pat.finished


def loss(gm: Any, batch: Any) -> Tensor:
    raise AssertionError("nothing reads a loss")


def test_what_contradicts_is_refused() -> None:
    gm, data = traced(ConvNet, torch.float64), Counted(calibration(ConvNet, torch.float64))
    with pytest.raises(InputError, match=r"'auto' chooses none of them; leave `loss` out, or name the criterion \('taylor'"):
        stp_fx.prune_graph(gm, "auto", 0.5, calibration=data, loss=loss)
    with pytest.raises(InputError, match="`loss` is for criteria that read gradients"):
        stp_fx.sweep(gm, [0.5], "auto", calibration=data, loss=loss)
    with pytest.raises(InputError, match="`loss` is for criteria that read gradients"):
        stp_fx.PATPassManager(gm, criterion="auto", train_loader=data, loss=loss)
    with pytest.raises(InputError, match=r"Auto\(compensation='mean'\) chooses for another repair than compensation=None"):
        stp_fx.prune_graph(gm, Auto("mean"), 0.5, calibration=data)
    with pytest.raises(InputError, match="for another repair than compensation='sequential'"):
        stp_fx.PATPassManager(gm, criterion=Auto("mean"), compensation="sequential", train_loader=data)
    with pytest.raises(InputError, match=r"name the base \('magnitude', 'variance'\)"):
        CostAware(base="auto")
    with pytest.raises(InputError, match="give `calibration`"):
        stp_fx.prune_graph(gm, "auto", 0.5, compensation="mean")
    with pytest.raises(InputError, match=r"`ignore` names 'nothing\.of\.it', which the graph does not have"):
        stp_fx.prune_graph(gm, "auto", 0.5, calibration=data, ignore="nothing.of.it")
    assert data.reads == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compensation": "most"}, "unknown compensation 'most'"),
        ({"compensation": 3}, "unknown compensation 3"),
        ({"recalibrated": 1}, "`recalibrated` is True or False"),
        ({"longest": -1.0}, "`longest` is a number of seconds"),
        ({"longest": float("nan")}, "`longest` is a number of seconds"),
        ({"reduction": "median"}, "unknown reduction 'median'"),
        ({"normalizer": "softmax"}, "unknown normalizer 'softmax'"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Auto(**fields)


@pytest.mark.parametrize("name", typing.get_args(CompensationName))
def test_every_compensation_has_a_branch(name: str) -> None:
    gm = stp_fx.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4))
    chosen = Auto(compensation=name).choose(gm, data=True)
    assert isinstance(chosen.criterion, Variance if name == "mean" else Reconstruction)
