from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from criteria_networks import Attention, Case, ConvNet, calibration, measured, traced
from criteria_references import observed
from torch import nn

import stp_fx
from stp_fx.criteria import ScoreContext, Variance, score_groups
from stp_fx.errors import CriterionError, InputError


@pytest.fixture(scope="module")
def case() -> Case:
    return measured(ConvNet)


def test_the_formula_of_the_report(case: Case) -> None:
    """Sums of x and of x^2 over batches and positions, after the activation."""
    values = observed(case, "outer")
    count = len(values)
    assert count == 3 * 8 * 6 * 6
    assert values.min() == 0  # after the ReLU
    mean = values.sum(0) / count
    expected = values.square().sum(0) / count - mean * mean
    np.testing.assert_allclose(case.scores(Variance())["inner.weight:0"], expected.numpy(), rtol=1e-9)


def test_several_positions_count_by_their_mean_and_sites_by_the_reduction(case: Case) -> None:
    at_inner = observed(case, "inner").var(0, correction=0)
    at_head = observed(case, "head").var(0, correction=0).reshape(6, 4).mean(1)
    both = torch.stack([at_inner, at_head])
    for reduction, expected in (("mean", both.mean(0)), ("max", both.amax(0)), ("prod", both.prod(0)), ("first", at_inner)):
        found = case.scores(Variance(reduction))["stem.weight:0"]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9)


def test_the_same_from_one_batch_or_many() -> None:
    gm = traced(ConvNet)
    batches = [x for x, _ in calibration(ConvNet)]
    plans = {
        stp_fx.plan_of(stp_fx.prune_graph(gm, "variance", 0.5, calibration=data)).to_json()
        for data in (batches, [torch.cat(batches)], torch.cat(batches), (x for x in batches))
    }
    assert len(plans) == 1


def test_a_constant_channel_goes_first() -> None:
    gm = traced(ConvNet)
    with torch.no_grad():
        gm.get_parameter("inner_norm.weight")[[1, 6]] = 0.0
        gm.get_parameter("inner_norm.bias")[[1, 6]] = 5.0  # a large constant: every weight criterion keeps it
    pruned = stp_fx.prune_graph(gm, "variance", 0.25, calibration=calibration(ConvNet))
    assert stp_fx.plan_of(pruned).kept["inner.weight", 0].tolist() == [0, 2, 3, 4, 5, 7]


def test_heads_and_head_dimensions() -> None:
    case = measured(Attention)
    scores = case.scores(Variance())
    assert {len(values) for values in scores.values()} >= {2, 4, 8, 12}


class Unread(nn.Module):
    """Half of the channels of ``first`` are read by a contraction, half by nothing but a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).tanh().split(3, -1)
        return self.second(left) + right.amax(-1, keepdim=True)


def test_units_that_nothing_reads_are_named_not_guessed() -> None:
    gm = stp_fx.trace(Unread(), torch.randn(2, 4))
    names = [group.name for group in stp_fx.analyze(gm).groups]
    unread = next(g.name for g in stp_fx.analyze(gm).groups if not any(m.axis.tensor == "second.weight" for m in g.members))
    with pytest.raises(CriterionError, match=f"no contraction reads the units of group '{unread}'"):
        stp_fx.prune_graph(gm, "variance", 0.5, calibration=[torch.randn(8, 4)])
    stp_fx.prune_graph(gm, "variance", 0.5, calibration=[torch.randn(8, 4)], ignore=[unread])
    assert len(names) == 2


def test_statistics_of_another_graph_are_refused(case: Case) -> None:
    other = measured(Attention)
    context = ScoreContext(other.context.tensors, 0, other.gm, case.context.statistics)
    with pytest.raises(InputError, match="collected on another graph"):
        score_groups(other.groups, Variance(), context)


def test_missing_statistics(case: Case) -> None:
    without = dataclasses.replace(case.context, statistics=None, cache={})
    with pytest.raises(CriterionError, match="give `calibration`, or run CollectStatistics"):
        Variance()(case.groups[0], without)
