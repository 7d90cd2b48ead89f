"""What holds for every criterion, whatever its mathematics; a new one is found by its name."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from criteria_networks import Attention, Case, ConvNet, Mlp, build, calibration, measured, traced
from criteria_references import reference
from torch import nn

import stp_fx
from stp_fx.criteria import NORMALIZERS, REDUCTIONS, known_criteria, needs_of, resolve
from stp_fx.errors import CriterionError

# "lamp" is magnitude under another default.
CRITERIA = [name for name in known_criteria() if name != "lamp"]
NO_NORM = {"bn_scale"}


@pytest.fixture(scope="module")
def case() -> Case:
    return measured(ConvNet)


def made(name: str, **fields: Any) -> Any:
    """The criterion of that name with other fields."""
    return dataclasses.replace(resolve(name), **fields)  # type: ignore[type-var]


@pytest.mark.parametrize("name", known_criteria())
def test_fields(name: str) -> None:
    criterion = resolve(name)
    assert dataclasses.is_dataclass(criterion)
    assert criterion.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert isinstance(criterion.needs, tuple)  # type: ignore[attr-defined]
    assert needs_of(criterion) == criterion.needs  # type: ignore[attr-defined]
    assert {"reduction", "normalizer"} <= {field.name for field in dataclasses.fields(criterion)}
    with pytest.raises(stp_fx.errors.InputError, match="unknown reduction 'median'"):
        made(name, reduction="median")
    with pytest.raises(stp_fx.errors.InputError, match="unknown normalizer 'softmax'"):
        made(name, normalizer="softmax")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_agrees_with_loops(case: Case, name: str, reduction: str, normalizer: str) -> None:
    scores = case.scores(made(name, reduction=reduction, normalizer=normalizer))
    assert len(scores) == 2
    for group in case.groups:
        expected = reference(name, case, group, reduction, normalizer)
        np.testing.assert_allclose(scores[group.name], expected, rtol=1e-5, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CRITERIA)
def test_finite_ordered_and_deterministic(case: Case, name: str, reduction: str, normalizer: str) -> None:
    criterion = made(name, reduction=reduction, normalizer=normalizer)
    plain = case.scores(made(name, reduction=reduction, normalizer="none"))
    first, second = case.scores(criterion), case.scores(criterion)
    assert first == second
    for group in case.groups:
        assert np.isfinite(first[group.name]).all()
        assert len(set(first[group.name])) > 1, "nothing is told apart"
        # A normaliser never changes the order in a group.
        np.testing.assert_array_equal(np.argsort(first[group.name], kind="stable"), np.argsort(plain[group.name], kind="stable"))


@pytest.mark.parametrize("name", known_criteria())
def test_scores_are_not_negative_so_that_lamp_applies(case: Case, name: str) -> None:
    for scores in case.scores(made(name, normalizer="none")).values():
        assert min(scores) >= 0


def permuted(model: ConvNet, order: list[int]) -> ConvNet:
    """The same function, with the inner channels in another order."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        result.inner.weight.copy_(model.inner.weight[order])
        result.outer.weight.copy_(model.outer.weight[:, order])
        for name, value in model.inner_norm.state_dict().items():
            if value.dim():
                result.inner_norm.state_dict()[name].copy_(value[order])
    return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_follows_a_permutation_of_channels(case: Case, name: str, reduction: str) -> None:
    order = [3, 0, 7, 5, 1, 2, 6, 4]
    model = case.model
    assert isinstance(model, ConvNet)
    other = measured(ConvNet, permuted(model, order))
    before, after = (each.scores(made(name, reduction=reduction)) for each in (case, other))
    inner = "inner.weight:0"
    np.testing.assert_allclose(after[inner], [before[inner][k] for k in order], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(after["stem.weight:0"], before["stem.weight:0"], rtol=1e-6, atol=1e-12)


def snapshot(gm: torch.fx.GraphModule) -> tuple[Any, ...]:
    values = {name: (value.dtype, value.clone(), value._version) for name, value in gm.state_dict().items()}
    parameters = [(p.requires_grad, p.grad) for p in gm.parameters()]
    return gm.code, values, parameters, [m.training for m in gm.modules()], torch.random.get_rng_state()


def assert_unchanged(gm: torch.fx.GraphModule, before: tuple[Any, ...]) -> None:
    code, values, parameters, modes, draws = snapshot(gm)
    assert (code, modes, parameters) == (before[0], before[3], before[2])
    assert torch.equal(draws, before[4])
    for name, (dtype, value, version) in values.items():
        assert (dtype, version) == (before[1][name][0], before[1][name][2])
        torch.testing.assert_close(value, before[1][name][1], rtol=0, atol=0, equal_nan=True)


@functools.cache
def graph_of(kind: type[nn.Module], dtype: torch.dtype) -> torch.fx.GraphModule:
    """A graph in training mode, which every test leaves as it is."""
    return traced(kind, dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("kind", [ConvNet, Attention, Mlp])
@pytest.mark.parametrize("name", known_criteria())
def test_pruning_keeps_dtype_device_and_the_original(name: str, kind: type[nn.Module], scope: str, dtype: torch.dtype) -> None:
    gm, batches = graph_of(kind, dtype), calibration(kind, dtype)
    before = snapshot(gm)
    if name in NO_NORM and kind is not ConvNet:
        with pytest.raises(CriterionError, match="no norm scales the units of group"):
            stp_fx.prune_graph(gm, name, 0.5, scope=scope, calibration=batches)
        assert_unchanged(gm, before)
        return
    pruned = stp_fx.prune_graph(gm, name, 0.5, scope=scope, calibration=batches)
    assert_unchanged(gm, before)
    assert {(p.dtype, p.device) for p in pruned.parameters()} == {(dtype, torch.device("cpu"))}
    assert stp_fx.cost(pruned).params < stp_fx.cost(gm).params
    output = pruned.eval()(batches[0][0])
    assert output.dtype == dtype
    assert output.isfinite().all()
    again = stp_fx.prune_graph(gm, name, 0.5, scope=scope, calibration=batches)
    assert stp_fx.plan_of(pruned).to_json() == stp_fx.plan_of(again).to_json()


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", CRITERIA)
def test_every_reduction_and_normalizer_prunes(name: str, scope: str) -> None:
    gm, batches = graph_of(ConvNet, torch.float64), calibration(ConvNet, batches=1)
    choices = [{"reduction": r} for r in REDUCTIONS] + [{"normalizer": n} for n in NORMALIZERS]
    for choice in choices:
        pruned = stp_fx.prune_graph(gm, made(name, **choice), 0.5, scope=scope, calibration=batches)
        kept = stp_fx.plan_of(pruned).kept
        assert sum(len(kept.get((tensor, 0), range(whole))) for tensor, whole in (("stem.weight", 6), ("inner.weight", 8))) == 7


@pytest.mark.parametrize("name", [name for name in known_criteria() if needs_of(resolve(name))])
def test_data_that_is_needed_and_missing(case: Case, name: str) -> None:
    gm = traced(ConvNet)
    with pytest.raises(stp_fx.errors.InputError, match="give `calibration`"):
        stp_fx.prune_graph(gm, name)
    bare = dataclasses.replace(case.context, statistics=None, gradients=None, cache={})
    with pytest.raises(CriterionError, match=r"group 'stem.weight:0' cannot be scored.*none were\s+collected"):
        resolve(name)(case.groups[0], bare)


@pytest.mark.parametrize("name", [name for name in known_criteria() if not needs_of(resolve(name))])
def test_calibration_is_not_read_where_nothing_needs_it(name: str) -> None:
    class Untouched(list):
        def __iter__(self) -> Any:
            raise AssertionError("read")

    stp_fx.prune_graph(build(ConvNet), name, 0.5, example_inputs=calibration(ConvNet)[0][0], calibration=Untouched())
