"""Whole experts are units: removed with their rows of the router, at a ratio of their own alone.

The oracle is the model as it was, its router's logits of the removed experts set to ``-inf`` by a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stp_fx
from stp_fx.analysis.groups import Group
from stp_fx.criteria.scores import score
from stp_fx.errors import CriterionError, InputError, NothingToPruneError, PlanError
from stp_fx.ir import provenance_of
from stp_fx.rewrite.removal import unmask

EXPERTS, TOP, WIDTH = 6, 2, 8
REMOVED, KEPT = [1, 4], [0, 2, 3, 5]
X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def softmax_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1).topk(TOP, -1)


def renormalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = logits.softmax(-1, dtype=torch.float64).topk(TOP, -1)
    return weights / weights.sum(-1, keepdim=True), chosen


def topk_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = logits.topk(TOP, -1)
    return weights.softmax(-1), chosen


class Routed(nn.Module):
    """Fused experts, all of them computed, weighed by what the router chose."""

    def __init__(self, route: Callable[[Tensor], tuple[Tensor, Tensor]] = softmax_first) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, 5, WIDTH)), nn.Parameter(torch.randn(EXPERTS, WIDTH, 5))
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        logits = self.router(tokens)
        return self.head(self.combine(tokens, logits, *self.route(logits)))

    def combine(self, tokens: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        gates = torch.zeros_like(logits).scatter(-1, chosen, weights)
        hidden = torch.einsum("td,ehd->teh", tokens, self.up).relu()
        return torch.einsum("teh,edh,te->td", hidden, self.down, gates)


class Scored(Routed):
    """Sigmoid scores; a correction chooses, the scores weigh (DeepSeek-V3 without groups of experts)."""

    correction: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("correction", torch.linspace(0.5, -0.5, EXPERTS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        scores = self.router(tokens).sigmoid()
        chosen = (scores + self.correction).topk(TOP, -1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        return self.head(self.combine(tokens, scores, weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen))


def make(kind: Callable[[], Routed]) -> Routed:
    torch.manual_seed(0)
    return kind().double().eval()


def without(model: Routed, x: Tensor, removed: list[int] = REMOVED) -> Tensor:
    hook = model.router.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor(removed), -torch.inf))
    if isinstance(model, Scored):  # sigmoid(-inf) + correction may still be chosen
        hook.remove()
        before = model.correction.clone()
        model.correction[removed] = -torch.inf
        result = model(x)
        model.correction.copy_(before)
        return result
    result = model(x)
    hook.remove()
    return result


KINDS = [
    pytest.param(lambda: Routed(softmax_first), id="softmax first"),
    pytest.param(lambda: Routed(renormalised), id="renormalised"),
    pytest.param(lambda: Routed(topk_first), id="topk first"),
    pytest.param(Scored, id="scored"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_removed_is_masked_is_never_chosen(kind: Callable[[], Routed]) -> None:
    model = make(kind)
    gm = stp_fx.trace(model, X)
    graph = stp_fx.analyze(gm)
    (group,) = [group for group in graph.groups if group.chosen]
    assert (group.chosen, group.size, group.exact) == (TOP, EXPERTS, True), group.notes
    plan = graph.plan_for({"router": REMOVED})
    removed, masked = stp_fx.apply_plan(gm, plan), stp_fx.apply_plan(gm, plan, mask=True)
    more = torch.randn(50, 4, dtype=torch.float64)
    expected = without(model, more)
    assert (expected - model(more)).abs().max() > 0.1, "the removed experts were chosen before"
    torch.testing.assert_close(removed(more), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked(more), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(removed.get_parameter("up"), model.up[KEPT])
    torch.testing.assert_close(removed.get_parameter("router.bias"), model.router.bias[KEPT])
    torch.testing.assert_close(unmask(masked)(more), model(more))


def test_no_gradient_reaches_a_masked_expert() -> None:
    gm = stp_fx.trace(make(Routed), X)
    masked = stp_fx.apply_plan(gm, stp_fx.analyze(gm).plan_for({"router": REMOVED}), mask=True)
    masked(X).sum().backward()
    gradient = masked.get_parameter("router.weight").grad
    assert gradient is not None
    assert gradient[REMOVED].abs().max() == 0
    assert gradient[KEPT].abs().max() > 0
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"target": "params", "ratio": 0.3}, {"ratios": {"*": 0.5}}])
def test_experts_stay_unless_they_are_named(options: dict[str, Any]) -> None:
    pruned = stp_fx.prune_graph(stp_fx.trace(make(Routed), X), **options)
    assert pruned.get_parameter("router.weight").shape[0] == EXPERTS
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in make(Routed).parameters())


@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "lamp", "fpgm"])
def test_a_ratio_of_their_own_removes_experts(criterion: str) -> None:
    gm = stp_fx.trace(make(Routed), X)
    data = {"calibration": [X], "loss": lambda m, b: m(b).square().mean()} if criterion == "taylor" else {}
    pruned = stp_fx.prune_graph(gm, criterion, 0.0, ratios={"router": 0.5}, **data)
    assert {n: tuple(p.shape) for n, p in pruned.named_parameters() if n in ("up", "router.weight")} == {
        "up": (3, 5, WIDTH),
        "router.weight": (3, WIDTH),
    }
    validation = provenance_of(pruned).validation
    assert validation is not None
    assert "masked = removed" in validation.ran
    assert pruned(X).shape == (7, 3)


def only_rows(group: Group, _: object) -> Tensor:
    if group.chosen:
        raise CriterionError("no experts")
    return torch.arange(float(group.size))


def test_experts_without_scores_stay_and_say_so() -> None:
    gm = stp_fx.trace(make(Routed), X)
    scores = score(gm, only_rows)
    assert not any(group.chosen for group in scores.groups)
    assert any("have no scores: " in note and "no experts" in note for note in scores.notes)
    assert stp_fx.prune_graph(gm, only_rows).get_parameter("up").shape[:2] == (EXPERTS, 3)
    with pytest.raises(
        InputError, match="names experts by 'router', but they are in `ignore`, or the criterion cannot score them"
    ):
        stp_fx.prune_graph(gm, only_rows, 0.0, ratios={"router": 0.5})


def test_experts_change_no_other_score() -> None:
    gm = stp_fx.trace(make(Routed), X)
    scores = score(gm, "magnitude")
    alone = score(gm, "magnitude", ignore=("router.weight:0",))
    found = {g.name: v for g, v in zip(scores.groups, scores.values, strict=True) if not g.chosen}
    assert len(found) == len(alone.groups) == len(scores.groups) - 1
    for group, values in zip(alone.groups, alone.values, strict=True):
        assert torch.equal(found[group.name], values)


def test_as_many_stay_as_are_chosen() -> None:
    gm = stp_fx.trace(make(Routed), X)
    pruned = stp_fx.prune_graph(gm, ratio=0.0, ratios={"router": 0.9})
    assert pruned.get_parameter("up").shape[0] == TOP
    graph = stp_fx.analyze(gm)
    with pytest.raises(InputError, match=r"leaves 1 of the 6 experts.*2 are chosen for every token; keep at least 2"):
        graph.plan_for({"router": [0, 1, 2, 3, 4]})
    few = graph.plan_for({"router": [0, 1, 2, 3]})
    stp_fx.apply_plan(gm, few)
    kept = {key: indices[:1] if len(indices) == TOP else indices for key, indices in few.kept.items()}
    with pytest.raises(PlanError, match=r"keeps 1 experts of group .*keep at least 2"):
        stp_fx.apply_plan(gm, type(few)(kept, few.sizes))


class GivesNumbers(Routed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        tokens = self.embed(x)
        logits = self.router(tokens)
        weights, chosen = self.route(logits)
        return self.head(self.combine(tokens, logits, weights, chosen)), chosen


class Compares(Routed):
    def combine(self, tokens: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().combine(tokens, logits, weights * (chosen != 0), chosen)


class InGroups(Routed):
    """Experts in three groups of two."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        logits = self.router(tokens)
        best = logits.view(-1, 3, 2).sum(-1).topk(2, -1)[1]
        open_ = torch.zeros(x.shape[0], 3, dtype=x.dtype).scatter(1, best, 1.0)
        mask = open_.unsqueeze(-1).expand(-1, 3, 2).reshape(-1, EXPERTS)
        weights, chosen = logits.masked_fill(mask == 0, -torch.inf).topk(TOP, -1)
        return self.head(self.combine(tokens, logits, weights.softmax(-1), chosen))


class Cut(Routed):
    def combine(self, tokens: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().combine(tokens, logits, weights, chosen) * logits.view(-1, 3, 2).square().sum((1, 2))[:, None]


class LooksUpElsewhere(Routed):
    def combine(self, tokens: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().combine(tokens, logits, weights + tokens.gather(-1, chosen), chosen)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (GivesNumbers, "graph output"),
        (Compares, "ne takes numbers of its positions"),
        (InGroups, "looked up by an index"),
        (Cut, "are a product"),
        (LooksUpElsewhere, "along another dimension"),
    ],
)
def test_what_cannot_be_followed_keeps_all_experts(kind: type[Routed], reason: str) -> None:
    graph = stp_fx.analyze(stp_fx.trace(make(kind), X))
    assert not any(group.chosen for group in graph.groups)
    assert reason in graph.explain("router.weight:0")
    with pytest.raises(InputError, match="cannot be removed"):
        graph.plan_for({"router": [1]})


class OnlyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.vectors = nn.Linear(4, EXPERTS), nn.Parameter(torch.randn(EXPERTS, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        weights, chosen = logits.softmax(-1).topk(TOP, -1)
        return torch.zeros_like(logits).scatter(-1, chosen, weights) @ self.vectors


def test_where_nothing_else_can_be_removed_the_error_names_the_way() -> None:
    with pytest.raises(NothingToPruneError, match="need a ratio: name their router in `ratios`"):
        stp_fx.prune_graph(stp_fx.trace(OnlyExperts().double(), X), ratio=0.5)
