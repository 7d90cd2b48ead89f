"""Data, losses and models that cannot serve: each is refused by name, and the graph stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from criteria_networks import ConvNet, calibration, traced
from test_contract import assert_unchanged, snapshot
from torch import fx

import stp_fx
from stp_fx.criteria import CostAware, Hessian, known_criteria, needs_of, resolve
from stp_fx.errors import InputError, StpFxError

DATA = ["variance", "reconstruction", "taylor", "hessian"]
GRADIENTS = ["taylor", "hessian", Hessian("hutchinson"), CostAware("taylor")]
SITES = ["variance", "reconstruction"]


@pytest.fixture
def gm() -> Iterator[fx.GraphModule]:
    """A graph in training mode with a gradient on it; whatever a test does, it must come out as it went in."""
    found = traced(ConvNet).train()
    found.get_parameter("stem.weight").grad = torch.ones_like(found.get_parameter("stem.weight"))
    before = snapshot(found)
    yield found
    assert_unchanged(found, before)


def refused(gm: fx.GraphModule, criterion: Any, match: str, calibration: Any, loss: Any = None) -> StpFxError:
    with pytest.raises(InputError, match=match) as error:
        stp_fx.prune_graph(gm, criterion, 0.5, calibration=calibration, loss=loss)
    return error.value


def test_all_that_read_data_are_here() -> None:
    assert set(DATA) == {name for name in known_criteria() if needs_of(resolve(name))}


@pytest.mark.parametrize("criterion", DATA)
@pytest.mark.parametrize("nothing", [[], (), iter(())], ids=["list", "tuple", "generator"])
def test_no_batch(gm: fx.GraphModule, criterion: str, nothing: Iterable[Any]) -> None:
    refused(gm, criterion, "`calibration` has no batch", nothing)


@pytest.mark.parametrize("criterion", DATA)
def test_no_calibration(gm: fx.GraphModule, criterion: str) -> None:
    refused(gm, criterion, "must be measured: give `calibration`", None)


@pytest.mark.parametrize("criterion", DATA)
def test_batches_without_a_sample(gm: fx.GraphModule, criterion: str) -> None:
    empty = (torch.zeros(0, 3, 6, 6, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    refused(gm, criterion, r"calibration batches are empty|loss of calibration batch 0 is nan", [empty])


@pytest.mark.parametrize("criterion", DATA)
@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((torch.zeros(4, 3, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)), r"batch 0: 'x' is \(4, 3, 6\)"),
        ((torch.zeros(4, 3, 6, 6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)), r"batch 0: 'x' .* torch.int64"),
        (("a", torch.zeros(4)), "batch 0: 'x' is a str"),
        ((), "batch 0 has 0 values; the graph takes 1: x"),
        ({"image": torch.zeros(4, 3, 6, 6)}, "batch 0: 'x' is a NoneType"),
    ],
    ids=["rank", "dtype", "text", "empty", "names"],
)
def test_batches_of_another_form(gm: fx.GraphModule, criterion: str, batch: Any, match: str) -> None:
    refused(gm, criterion, match, [batch])


@pytest.mark.parametrize("criterion", DATA)
@pytest.mark.parametrize("data", ["images", {"x": torch.zeros(4, 3, 6, 6)}, 3])
def test_what_is_no_iterable_of_batches(gm: fx.GraphModule, criterion: str, data: Any) -> None:
    with pytest.raises((InputError, TypeError), match=r"calibration|iterable"):
        stp_fx.prune_graph(gm, criterion, 0.5, calibration=data)


@pytest.mark.parametrize("criterion", SITES)
def test_activations_that_are_not_finite_name_batch_and_site(gm: fx.GraphModule, criterion: str) -> None:
    good = calibration(ConvNet)[0][0]
    poisoned = good.clone()
    poisoned[2, 1, 3, 3] = float("nan")
    message = str(refused(gm, criterion, "calibration batch 1: .* holds values that are not finite", [good, poisoned]))
    assert "read by inner" in message


@pytest.mark.parametrize("criterion", GRADIENTS)
@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda gm, batch: gm(batch[0]), r"loss of calibration batch 0 is \(8, 4\); a loss is one scalar"),
        (lambda gm, batch: 1.0, "loss of calibration batch 0 is float"),
        (lambda gm, batch: gm(batch[0]).sum() * float("nan"), "loss of calibration batch 0 is nan"),
        (lambda gm, batch: batch[0].sum(), "does not depend on any parameter"),
        (lambda gm, batch: gm(batch[0]).sum().detach(), "does not depend on any parameter"),
        (torch.nn.functional.cross_entropy, "must be Tensor, not .*; it is called with the model and a batch, as in loss=lambda"),
    ],
    ids=["vector", "number", "nan", "unrelated", "detached", "of outputs and targets"],
)
def test_losses(gm: fx.GraphModule, criterion: Any, loss: Callable[..., Any], match: str) -> None:
    refused(gm, criterion, match, calibration(ConvNet), loss)


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_batches_without_a_target_ask_for_a_loss(gm: fx.GraphModule, criterion: Any) -> None:
    batches = [x for x, _ in calibration(ConvNet)]
    refused(gm, criterion, "give `loss`", batches)
    pruned = stp_fx.prune_graph(gm, criterion, 0.5, calibration=batches, loss=lambda gm, x: gm(x).square().mean())
    assert pruned.get_parameter("inner.weight").shape[0] == 4


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_a_frozen_model(criterion: Any) -> None:
    gm = traced(ConvNet).requires_grad_(False)
    before = snapshot(gm)
    refused(gm, criterion, "no parameter requires gradients.*unfreeze", calibration(ConvNet))
    assert_unchanged(gm, before)
    with torch.no_grad():  # being called without gradients does not matter
        stp_fx.prune_graph(traced(ConvNet), criterion, 0.5, calibration=calibration(ConvNet))


@pytest.mark.parametrize("criterion", SITES)
def test_a_frozen_model_serves_criteria_without_gradients(criterion: str) -> None:
    gm = traced(ConvNet).requires_grad_(False)
    pruned = stp_fx.prune_graph(gm, criterion, 0.5, calibration=calibration(ConvNet))
    assert pruned.get_parameter("inner.weight").shape[0] == 4


def test_a_loss_of_ones_own_is_the_one_that_is_differentiated(gm: fx.GraphModule) -> None:
    batches = calibration(ConvNet)

    def same(graph: fx.GraphModule, batch: Any) -> torch.Tensor:
        return F.cross_entropy(graph(batch[0]), batch[1])

    plans = [stp_fx.plan_of(stp_fx.prune_graph(gm, "taylor", 0.5, calibration=batches, loss=loss)) for loss in (None, same)]
    assert plans[0].to_json() == plans[1].to_json()
