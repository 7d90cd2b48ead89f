"""Taylor and Hessian: forms, frozen parameters, signs, and the collected numbers behind them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from criteria_networks import Case, ConvNet, Mlp, calibration, measured, traced
from criteria_references import hessian, normalized, reduced, taylor

import stp_fx
from stp_fx.criteria import Hessian, ScoreContext, Taylor
from stp_fx.criteria.sums import axis_sums
from stp_fx.errors import CriterionError, InputError
from stp_fx.measure.gradients import Gradients, collect_gradients


@pytest.fixture(scope="module")
def case() -> Case:
    return measured(ConvNet)


@pytest.mark.parametrize("reduction", ["mean", "prod", "first"])
def test_elementwise_taylor(case: Case, reduction: str) -> None:
    scores = case.scores(Taylor("elementwise", reduction, "mean"))
    for group in case.groups:
        expected = normalized(reduced(taylor(case, group, reduction, elementwise=True), reduction), "mean")
        np.testing.assert_allclose(scores[group.name], expected, rtol=1e-9)


@pytest.mark.parametrize("reduction", ["sum", "max", "gate"])
def test_hutchinson(case: Case, reduction: str) -> None:
    gradients = case.context.gradients
    assert gradients is not None
    assert gradients.hessian is not None
    scores = case.scores(Hessian("hutchinson", reduction))
    flat = [score for values in scores.values() for score in values]
    assert min(flat) >= 0
    for group in case.groups:
        expected = reduced(hessian(case, group, reduction, dict(gradients.hessian)), reduction)
        np.testing.assert_allclose(scores[group.name], expected, rtol=1e-9)


def test_negative_curvature_cancels_within_a_unit_and_scores_nothing_below_zero(make_group, identity) -> None:
    tensors = {"w": torch.tensor([[1.0, 1.0], [1.0, 1.0]])}
    group = make_group(tensors, [("w", 0, "weight", identity(2))], 2)
    gradients = Gradients({}, None, {"w": torch.tensor([[3.0, -1.0], [1.0, -3.0]])})
    assert Hessian("hutchinson")(group, ScoreContext(tensors, gradients=gradients)).tolist() == [1.0, 0.0]


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    gm = traced(Mlp)
    curvature = {name: torch.rand_like(p) for name, p in gm.named_parameters()}

    def loss(graph, batch):
        return sum((0.5 * curvature[name] * p * p).sum() for name, p in graph.named_parameters())

    found = collect_gradients(gm, calibration(Mlp), loss, hutchinson=2)
    assert found.hessian is not None
    for name, value in found.hessian.items():
        torch.testing.assert_close(value, curvature[name])


def test_the_multivariate_form_predicts_the_change_of_the_loss(case: Case) -> None:
    """The first-order change when a unit's input column shrinks a little."""
    batches = case.batches
    model, eps = case.model, 1e-6
    assert isinstance(model, ConvNet)

    def loss() -> float:
        return sum(torch.nn.functional.cross_entropy(model(x), y).item() for x, y in batches) / len(batches)

    group = next(g for g in case.groups if g.name == "inner.weight:0")
    alone = dataclasses.replace(group, members=tuple(m for m in group.members if m.axis.name == "outer.weight:1"))
    scores = Taylor()(alone, case.context)
    before = loss()
    with torch.no_grad():
        model.outer.weight[:, 3] *= 1 - eps
        change = abs(loss() - before) / eps
        model.outer.weight[:, 3] /= 1 - eps
    assert scores[3].item() == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_frozen_parameters_are_left_out(criterion: str) -> None:
    free, part = traced(ConvNet), traced(ConvNet)
    for name in ("inner_norm.weight", "outer.weight"):
        part.get_parameter(name).requires_grad_(False)
    pruned = stp_fx.prune_graph(part, criterion, 0.5, calibration=calibration(ConvNet))
    assert pruned.get_parameter("inner.weight").shape[0] == 4
    assert not pruned.get_parameter("outer.weight").requires_grad
    chosen = stp_fx.criteria.resolve(criterion)
    found = collect_gradients(free, calibration(ConvNet), fisher=True)
    group = next(g for g in stp_fx.analyze(free).groups if g.name == "inner.weight:0")
    context = ScoreContext(dict(free.named_parameters()), gradients=found)
    alone = dataclasses.replace(group, members=tuple(m for m in group.members if m.axis.tensor == "inner.weight"))
    expected = chosen(alone, context)
    held = {"inner_norm.weight", "outer.weight"}
    less = Gradients(*({k: v for k, v in d.items() if k not in held} for d in (found.mean, found.fisher or {})))
    torch.testing.assert_close(chosen(group, dataclasses.replace(context, gradients=less, cache={})), expected)


@pytest.mark.parametrize("criterion", ["taylor", "hessian", Hessian("hutchinson")])
def test_a_group_without_gradients_names_its_frozen_parameters(criterion) -> None:
    gm = traced(ConvNet)
    for name in ("inner.weight", "inner_norm.weight", "outer.weight"):
        gm.get_parameter(name).requires_grad_(False)
    with pytest.raises(CriterionError, match=r"'inner.weight:0'.*'inner.weight', 'outer.weight', 'inner_norm.weight' are frozen"):
        stp_fx.prune_graph(gm, criterion, 0.5, calibration=calibration(ConvNet))
    stp_fx.prune_graph(gm, criterion, 0.5, calibration=calibration(ConvNet), ignore=["inner.weight:0"])


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="unknown form 'both'"):
        Taylor("both")
    with pytest.raises(InputError, match="unknown method 'exact'"):
        Hessian("exact")
    assert Hessian().needs == ("fisher",)
    assert Hessian("hutchinson").needs == ("hessian",)


@pytest.mark.parametrize("shape", [(3,), (4, 5), (3, 4, 2), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_axis_sums(shape: tuple[int, ...], dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stp_fx.criteria.sums, "_BLOCK", block)
    first, second = (torch.randn(shape).to(dtype) for _ in range(2))
    whole = first.double() * second.double()
    sums = axis_sums([first, second], range(len(shape)))
    for dim in range(len(shape)):
        others = [k for k in range(len(shape)) if k != dim]
        torch.testing.assert_close(torch.from_numpy(sums[dim]), whole.sum(others) if others else whole)
    magnitudes = axis_sums([first, second], range(len(shape)), absolute=True)
    torch.testing.assert_close(torch.from_numpy(magnitudes[0]), whole.abs().reshape(shape[0], -1).sum(1))
    torch.testing.assert_close(first.double() * second.double(), whole, rtol=0, atol=0)  # float64 factors are not written to
