from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from criteria_networks import Attention, Case, ConvNet, calibration, measured, traced
from criteria_references import cost_aware, saved_macs
from torch import nn

import stp_fx
from stp_fx.criteria import CostAware, Magnitude, Random, Taylor, normalize_scores
from stp_fx.errors import CriterionError, InputError


@pytest.fixture(scope="module")
def case() -> Case:
    return measured(ConvNet)


def shares(case: Case) -> dict[str, float]:
    saved = {group.name: saved_macs(case, group) for group in case.groups}
    return {name: value / max(saved.values()) for name, value in saved.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("normalizer", ["none", "max", "mean"])
def test_formulas(case: Case, alpha: float, beta: float, normalizer: str) -> None:
    base, share = case.scores(Magnitude(normalizer=normalizer)), shares(case)
    options = {"alpha": alpha, "beta": beta, "normalizer": normalizer}
    for name, b in ((name, np.array(values)) for name, values in base.items()):
        r = share[name] ** beta
        for mode, form, expected in (
            ("additive", "printed", alpha * b + (1 - alpha) * r),
            ("additive", "costly_first", alpha * b + (1 - alpha) * (1 - r)),
            ("multiplicative", "printed", b * r),
            ("multiplicative", "costly_first", b / r),
        ):
            found = case.scores(CostAware(mode=mode, form=form, **options))[name]  # type: ignore[arg-type]
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_any_base_with_its_own_needs(case: Case) -> None:
    assert CostAware("variance").needs == ("statistics",)
    assert CostAware(Taylor()).needs == ("gradients",)
    assert CostAware("mac_aware").needs == ()
    for base in ("fpgm", Taylor("elementwise"), lambda group, context: torch.arange(group.size) + 1.0):
        scores = case.scores(CostAware(base, alpha=1.0, normalizer="none"))  # type: ignore[arg-type]
        plain = case.scores(stp_fx.criteria.resolve(base))  # type: ignore[arg-type]
        assert scores == plain
    assert CostAware(Taylor(), reduction="max").criterion == Taylor(reduction="max")
    assert CostAware(Taylor(reduction="sum")).criterion == Taylor(reduction="sum")


def test_alpha_one_is_the_base_and_alpha_zero_the_cost(case: Case) -> None:
    only = case.scores(CostAware(alpha=0.0))
    for name, share in shares(case).items():
        np.testing.assert_allclose(only[name], [1 - share] * len(only[name]))
    base = case.scores(Magnitude())
    for name, values in case.scores(CostAware(alpha=1.0)).items():
        np.testing.assert_allclose(values, normalize_scores(np.array(base[name]), "max"))


def test_the_largest_cost_is_that_of_the_groups_that_are_scored(case: Case) -> None:
    group = min(case.groups, key=lambda g: saved_macs(case, g))
    (alone,) = stp_fx.criteria.score_groups([group], CostAware(alpha=0.0), dataclasses.replace(case.context, cache={}))
    assert alone.tolist() == [0.0] * group.size


def test_reference_of_the_default(case: Case) -> None:
    for group in case.groups:
        np.testing.assert_allclose(case.scores(CostAware())[group.name], cost_aware(case, group, "mean", "max"), rtol=1e-6)


def macs_removed(gm: torch.fx.GraphModule, criterion: object, ratio: float) -> float:
    pruned = stp_fx.prune_graph(gm, criterion, ratio, scope="global", max_ratio=0.9)  # type: ignore[arg-type]
    return 1 - stp_fx.cost(pruned).macs / stp_fx.cost(gm).macs


@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("mode", ["additive", "multiplicative"])
def test_the_default_serves_the_aim_and_the_printed_form_does_not(mode: str, ratio: float) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    gm = stp_fx.trace(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
    base = macs_removed(gm, Magnitude(normalizer="max"), ratio)
    aim = macs_removed(gm, CostAware(mode=mode), ratio)
    printed = macs_removed(gm, CostAware(mode=mode, form="printed"), ratio)
    assert aim > base + 0.02
    assert aim > printed + 0.02
    assert aim > macs_removed(gm, "magnitude", ratio) + 0.02


def test_negative_scores_cannot_be_multiplied(case: Case) -> None:
    with pytest.raises(InputError, match="gaussian"):
        CostAware(mode="multiplicative", normalizer="gaussian")
    with pytest.raises(CriterionError, match=r"negative scores of group 'stem.weight:0'"):
        case.scores(CostAware(Magnitude(normalizer="gaussian"), mode="multiplicative", normalizer="none"))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Whatever a user's cost function gives."""

    values: tuple[float, ...]

    def __call__(self, context: object, per: str) -> np.ndarray:
        return np.array(self.values)


def test_a_unit_that_costs_nothing(case: Case) -> None:
    scores = case.scores(CostAware(cost=Costs((2.0, 0.0)), mode="multiplicative"))
    assert all(np.isfinite(values).all() for values in scores.values())
    with pytest.raises(CriterionError, match="no unit costs anything"):
        case.scores(CostAware(cost=Costs((0.0, 0.0))))


@pytest.mark.parametrize("values", [(1.0,), (1.0, -1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_costs_that_are_none(case: Case, values: tuple[float, ...]) -> None:
    with pytest.raises(CriterionError, match="finite cost of at least 0"):
        case.scores(CostAware(cost=Costs(values)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", -0.1), ("alpha", 1.5), ("alpha", float("nan")), ("alpha", "1"), ("alpha", True),
        ("beta", -1), ("beta", float("inf")), ("beta", None),
        ("mode", "sum"), ("form", "report"), ("per", "channel"), ("cost", 3), ("base", "macaware"),
    ],
)  # fmt: skip
def test_bad_arguments(field: str, value: object) -> None:
    with pytest.raises(InputError):
        CostAware(**{field: value}).needs  # type: ignore[arg-type]  # noqa: B018
    with pytest.raises(InputError, match="no `reduction`"):
        CostAware(lambda group, context: torch.zeros(group.size), reduction="max")


def test_attention_and_targets_in_macs() -> None:
    gm = traced(Attention)
    pruned = stp_fx.prune_graph(gm, CostAware(Random()), 0.3, scope="global", target="macs")
    assert stp_fx.cost(pruned).macs <= 0.7 * stp_fx.cost(gm).macs
    data = calibration(Attention)
    assert isinstance(stp_fx.prune_graph(gm, CostAware("reconstruction"), 0.3, calibration=data), nn.Module)
