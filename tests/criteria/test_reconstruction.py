"""Reconstruction against regressions solved from scratch, for every kind of consumer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from criteria_networks import Attention, Case, ConvNet, measured
from criteria_references import covariance_of, greedy
from torch import Tensor, nn

import stp_fx
from stp_fx.criteria import Reconstruction, ScoreContext, score_groups
from stp_fx.criteria.elimination import Elimination, precision
from stp_fx.errors import CriterionError, InputError
from stp_fx.measure.statistics import collect_statistics


def scores_of(gm: torch.fx.GraphModule, batches: list[Tensor], criterion: Reconstruction) -> dict[str, list[float]]:
    tensors = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    context = ScoreContext(tensors, 0, gm, collect_statistics(gm, batches, covariance=True))
    groups = stp_fx.analyze(gm).groups
    found = score_groups(groups, criterion, context)
    return {group.name: values.tolist() for group, values in zip(groups, found, strict=True)}


def rows(value: Tensor, dim: int = 1) -> Tensor:
    return value.detach().movedim(dim, -1).reshape(-1, value.shape[dim])


@pytest.mark.parametrize("panel", [1, 3, 64])
@pytest.mark.parametrize(("units", "block"), [(11, 1), (4, 3), (9, 2), (1, 5), (1, 1)])
def test_elimination_agrees_with_regressions(units: int, block: int, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stp_fx.criteria.elimination, "_PANEL", panel)
    torch.manual_seed(units)
    size = units * block
    covariance = covariance_of(torch.randn(60, size).double() @ torch.randn(size, size).double())
    weight = torch.randn(size, 4).double()

    def positions(unit: int) -> list[int]:
        return list(range(unit * block, (unit + 1) * block))

    expected = greedy(units, [(covariance, weight, positions)], sum)
    state = Elimination(torch.linalg.inv(covariance), weight @ weight.T, block)
    scores, left, total = [0.0] * units, set(range(units)), 0.0
    while left:
        costs = state.costs().tolist()
        unit = min(left, key=lambda u: costs[u])
        total += costs[unit]
        scores[unit] = total
        left.remove(unit)
        state.remove(unit)
    np.testing.assert_allclose(scores, expected, rtol=1e-8)
    # With everything gone the error is the outputs' own variance.
    assert total == pytest.approx(float(torch.trace(weight.T @ covariance @ weight)))


class Grouped(nn.Module):
    """Inner channels read by two convolution groups; ``transposed`` by a transposed convolution."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 3, padding=1)
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.outer = kind(8, 6, 3, padding=1, groups=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.outer(torch.tanh(self.inner(x)))))


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions_absorb_within_a_group(transposed: bool) -> None:
    torch.manual_seed(0)
    model = Grouped(transposed).double()
    x = torch.randn(16, 3, 5, 5, dtype=torch.float64)
    values = rows(torch.tanh(model.inner(x)))
    together = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).double()
    covariance = torch.cov(values.T, correction=0) * together
    covariance += 1e-4 * covariance.diagonal().mean() * torch.eye(8).double()
    weight = torch.zeros(8, 6, 9, dtype=torch.float64)
    for position in range(8):
        part = slice(3 * (position // 4), 3 * (position // 4) + 3)
        kernel = model.outer.weight.detach()
        weight[position, part] = (kernel[position] if transposed else kernel[part, position % 4]).flatten(1)
    after = covariance_of(rows(torch.relu(model.outer(torch.tanh(model.inner(x))))))
    gm = stp_fx.trace(model, x)
    scores = scores_of(gm, [x], Reconstruction())
    checked = 0
    for group in stp_fx.analyze(gm).groups:
        member = next((m for m in group.members if m.axis.tensor == "inner.weight"), None)
        if member is None:
            continue

        def positions(unit: int, member=member) -> list[int]:
            return member.index[member.unit == unit].tolist()

        if group.size == 2:  # a convolution group goes with its outputs: they are missed by the head, not its inputs
            sites = [(after, model.head.weight.detach()[:, :, 0, 0].T, lambda unit: [3 * unit, 3 * unit + 1, 3 * unit + 2])]
        else:
            sites = [(covariance, weight.flatten(1), positions)]
        np.testing.assert_allclose(scores[group.name], greedy(group.size, sites, sum), rtol=1e-7)
        checked += 1
    assert checked == 2  # the two groups, and the four places inside each


def attention_sites(case: Case) -> dict[str, Tensor]:
    """What query, key and the joining layer see, by hand: [observations, channels]."""
    model = case.model
    assert isinstance(model, Attention)
    seen: dict[str, list[Tensor]] = {"query": [], "key": [], "join": []}
    hooks = [
        model.query.register_forward_hook(lambda m, a, out: seen["query"].append(out)),
        model.key.register_forward_hook(lambda m, a, out: seen["key"].append(out)),
        model.join.register_forward_pre_hook(lambda m, a: seen["join"].append(a[0])),
    ]
    for x, _ in case.batches:
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([v.detach() for v in values]) for name, values in seen.items()}


def test_query_and_key_keep_their_own_signal_and_heads_go_as_blocks() -> None:
    case = measured(Attention)
    sites, model = attention_sites(case), case.model
    assert isinstance(model, Attention)
    scores = case.scores(Reconstruction())
    group_of: dict[tuple[str, int], str] = {}
    for group in case.groups:
        for member in group.members:
            group_of[member.axis.tensor, group.size] = group.name
    per_head = {name: rows(value.unflatten(-1, (2, 4)), -1) for name, value in sites.items()}
    own = [(covariance_of(per_head[name]), torch.eye(4).double(), lambda u: [u]) for name in ("query", "key")]
    np.testing.assert_allclose(scores[group_of["query.weight", 4]], greedy(4, own, sum), rtol=1e-7)
    joined = covariance_of(rows(sites["join"], -1))
    weight = model.join.weight.detach().T
    heads = greedy(2, [(joined, weight, lambda u: list(range(4 * u, 4 * u + 4)))], sum)
    np.testing.assert_allclose(scores[group_of["query.weight", 2]], heads, rtol=1e-7)
    places = greedy(4, [(joined, weight, lambda u: [u, u + 4])], sum)
    np.testing.assert_allclose(scores[group_of["value.weight", 4]], places, rtol=1e-7)


def linear_case(mix: Callable[[Tensor], Tensor]) -> tuple[torch.fx.GraphModule, Tensor]:
    """Two linear layers; the first one's outputs are ``mix`` of five independent signals."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Identity(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(mix(torch.eye(5, dtype=torch.float64)))
    x = torch.randn(400, 5, dtype=torch.float64)
    return stp_fx.trace(model, x), x


def test_what_the_others_can_say_costs_nothing() -> None:
    """Channel 5 is the sum of channels 0 and 1: one of the three goes for free, whatever its size and its weights."""
    gm, x = linear_case(lambda eye: torch.cat([eye, eye[:1] + eye[1:2]]))
    with torch.no_grad():
        gm.get_parameter("2.weight")[:, [0, 1, 5]] *= 100
    (scores,) = scores_of(gm, [x], Reconstruction(ridge=1e-9)).values()
    cheapest = int(np.argmin(scores))
    assert cheapest in (0, 1, 5)
    assert min(scores) < 1e-3
    assert sorted(scores)[1] > 0.01
    variance = stp_fx.prune_graph(gm, "variance", 1 / 6, calibration=[x])
    assert 5 in stp_fx.plan_of(variance).kept["0.weight", 0].tolist()  # variance sees the largest signal there


def test_dead_channels_go_first_and_without_any_cost() -> None:
    gm, x = linear_case(lambda eye: torch.cat([eye[:4], torch.zeros(2, 5, dtype=torch.float64)]))
    (scores,) = scores_of(gm, [x], Reconstruction()).values()
    assert set(np.argsort(scores)[:2].tolist()) == {4, 5}
    assert max(scores[4:]) < 1e-3 * min(scores[:4])
    (nothing,) = scores_of(gm, [x * 0], Reconstruction()).values()
    assert max(nothing) < 1e-20


def test_fewer_observations_than_channels() -> None:
    gm, x = linear_case(lambda eye: torch.cat([eye, eye[:1]]))
    (scores,) = scores_of(gm, [x[:2]], Reconstruction()).values()
    assert np.isfinite(scores).all()


def test_statistics_without_covariance() -> None:
    gm, x = linear_case(lambda eye: torch.cat([eye, eye[:1]]))
    context = ScoreContext(dict(gm.named_parameters()), 0, gm, collect_statistics(gm, [x]))
    with pytest.raises(CriterionError, match="covariance=True"):
        score_groups(stp_fx.analyze(gm).groups, Reconstruction(), context)


def test_a_covariance_that_is_none(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(CriterionError, match=r"covariance at here is not positive definite.*larger `ridge`"):
        precision(torch.tensor([[1.0, 3.0], [3.0, 1.0]]).double(), 1e-4, "here")


def test_rounding_is_not_passed_over() -> None:
    state = Elimination(-torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), 1)
    with pytest.raises(CriterionError, match="larger `ridge`"):
        state.remove(0)


@pytest.mark.parametrize("ridge", [0, -1.0, 2.0, float("nan"), "1", True])
def test_bad_ridge(ridge: object) -> None:
    with pytest.raises(InputError, match="ridge"):
        Reconstruction(ridge=ridge)  # type: ignore[arg-type]


def test_units_that_share_positions_are_refused() -> None:
    case = measured(ConvNet)
    group = case.groups[0]
    (member, *_) = case.context.site_members(group)
    shared = dataclasses.replace(member, index=np.zeros_like(member.index))
    with pytest.raises(CriterionError, match="do not divide the positions"):
        stp_fx.criteria.reconstruction._by_unit(shared, group)
