"""Random networks under random budgets: the plan meets the target within one step, or an error or a note tells why not."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, note, seed
from hypothesis import strategies as st
from torch import fx

import stp_fx
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.analysis.names import prunable_groups
from stp_fx.criteria import score
from stp_fx.errors import InputError, NothingToPruneError, TargetError
from stp_fx.report.run_report import RunReport, run_report
from stp_fx.selection import Selection, choose
from stp_fx.testing import Recipe, networks, networks_with, token_networks

from .budget import shard_settings, wanted_examples

EXAMPLES = wanted_examples(quick=80)
SHARDS = 4 if EXAMPLES <= 200 else 16
LEAST_MET = 0.35
"""At least this share of the plans is made; the others are refused with an error that tells why."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """``ignored``, ``own``: numbers from which a group is picked, or None."""

    ratio: float
    scope: str
    target: str
    round_to: int
    max_ratio: float
    products: str
    seed: int
    ignored: int | None
    own: tuple[int, float] | None


def budgets() -> st.SearchStrategy[Budget]:
    return st.builds(
        Budget,
        ratio=st.sampled_from([0.5, 0.3, 0.7, 0.2, 0.75, 0.0]),
        scope=st.sampled_from(["local", "global", "isomorphic"]),
        target=st.sampled_from(["macs", "params", "channels"]),
        round_to=st.sampled_from([1, 2, 3, 4, 8]),
        max_ratio=st.sampled_from([1.0, 1.0, 0.75, 0.5]),
        products=st.sampled_from(["auto", "inner", "outer", "both", "none"]),
        seed=st.integers(0, 50),
        ignored=st.none() | st.integers(0, 20),
        own=st.none() | st.tuples(st.integers(0, 20), st.sampled_from([0.0, 0.25, 0.5])),
    )


class Budgeted:
    """A network with a budget, and the plans that a call makes of it."""

    def __init__(self, recipe: Recipe, budget: Budget) -> None:
        self.gm: fx.GraphModule = stp_fx.trace(recipe.build(), recipe.inputs())
        self.graph: ChannelGraph = stp_fx.analyze(self.gm)
        self.budget = budget
        groups = prunable_groups(self.gm, self.graph, ())
        ignored = None if budget.ignored is None else groups[budget.ignored % len(groups)]
        self.ignore = () if ignored is None else (ignored.name,)
        self.groups: list[Group] = prunable_groups(self.gm, self.graph, self.ignore)
        self.scores = score(self.gm, stp_fx.criteria.Random(seed=budget.seed), ignore=self.ignore)
        self.ratios: dict[str, float] = {}
        if budget.own is not None:
            self.ratios[self.groups[budget.own[0] % len(self.groups)].name] = budget.own[1]

    def plan(self, ratio: float) -> tuple[np.ndarray, RunReport]:
        """The units removed (bool [units]) and the report of the plan for ``ratio`` of the target."""
        budget = self.budget
        options = dataclasses.asdict(budget)
        options = {name: options[name] for name in ("scope", "target", "round_to", "max_ratio", "products")}
        choice = choose(self.gm, self.scores, Selection(ratio, **options, ratios=self.ratios or None))
        assert choice.plan == self.graph.plan_removing(choice.removed)
        return choice.removed, run_report(self.gm, self.scores, choice)

    def cost(self, removed: np.ndarray) -> int:
        survivors = self.graph.survivors_without(removed)
        return survivors.params if self.budget.target == "params" else survivors.macs

    def limit(self, ratio: float) -> float:
        return (1 - ratio) * self.cost(np.zeros(self.graph.units, dtype=bool)) * (1 + 1e-12)

    def one_step_less(self, removed: np.ndarray) -> Iterator[np.ndarray]:
        """The plans that give back the best up to ``round_to`` units of one group without a ratio of its own."""
        for group, scores in zip(self.scores.groups, self.scores.values, strict=True):
            best_first = [int(u) for u in group.units[np.argsort(-scores.numpy(), kind="stable")] if removed[u]]
            for count in range(1, 1 + min(self.budget.round_to, len(best_first)) if group.name not in self.ratios else 0):
                less = removed.copy()
                less[best_first[:count]] = False
                yield less

    def counts(self, removed: np.ndarray) -> dict[str, int]:
        return {group.name: int(removed[group.units].sum()) for group in self.graph.groups}


def check_constraints(case: Budgeted, removed: np.ndarray, report: RunReport) -> None:
    budget, counts = case.budget, case.counts(removed)
    given = {group.name for group in case.groups}
    for group in case.graph.groups:
        kept = group.size - counts[group.name]
        assert kept >= 1
        assert kept == group.size or (kept % budget.round_to == 0 and group.name in given), group.name
        assert counts[group.name] <= math.floor(budget.max_ratio * group.size + 1e-9), group.name
    assert all(not removed[piece].all() for piece in case.graph.pieces())
    for name, ratio in case.ratios.items():
        size = next(group.size for group in case.groups if group.name == name)
        assert counts[name] <= math.floor(ratio * size + 1e-9)
        if counts[name] < math.floor(ratio * size + 1e-9) and budget.products == "none":
            assert any(name in each for each in report.notes)
    if budget.ratio == 0 and not any(case.ratios.values()):
        assert not removed.any()


def check_cost(case: Budgeted, removed: np.ndarray) -> None:
    """The target is met, no longer so with one step less, and plans for lower ratios are part of this one."""
    ratio = case.budget.ratio
    limit = case.limit(ratio)
    assert case.cost(removed) <= limit
    if any(removed[group.units].any() for group in case.groups if group.name not in case.ratios):
        assert any(case.cost(less) > limit for less in case.one_step_less(removed))
    low, high = 0.0, ratio
    for _ in range(6):
        middle = (low + high) / 2
        found = case.plan(middle)[0]
        assert not (found & ~removed).any()
        if np.array_equal(found, removed):
            high = middle
        else:
            assert case.cost(found) > limit
            low = middle


def check_channels(case: Budgeted, removed: np.ndarray, report: RunReport) -> None:
    """``floor(ratio * n)`` of every group in the local scope (less where a product shares the ratio), and notes for less."""
    budget, counts = case.budget, case.counts(removed)
    if budget.products in ("none", "both") or budget.scope != "local":
        return
    short = False
    for group in case.groups:
        ratio = case.ratios.get(group.name, budget.ratio)
        asked = math.floor(ratio * group.size + 1e-9)
        assert counts[group.name] <= asked
        in_product = any(group.index in factor for product in case.graph.products for factor in product.factors)
        short |= counts[group.name] < asked and not in_product
    assert not short or any("asked to remove" in each for each in report.notes)


def check_refusal(error: InputError, budget: Budget) -> None:
    """An error names the constraint that is in the way."""
    if isinstance(error, TargetError):
        assert budget.target != "channels"
        assert "held back by: " in str(error)
    else:
        assert f"round_to={budget.round_to}" in str(error) or f"max_ratio={budget.max_ratio:g}" in str(error)
        assert budget.ratio > 0 or budget.own is not None


def hold(recipe: Recipe, budget: Budget, tally: collections.Counter[str]) -> None:
    tally.update(["networks"])
    try:
        case = Budgeted(recipe, budget)
        removed, report = case.plan(budget.ratio)
    except NothingToPruneError:
        tally.update(["nothing to prune"])
        return
    except InputError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        check_refusal(refused, budget)
        tally.update(["out of reach" if isinstance(refused, TargetError) else "no room"])
        return
    note(f"{case.counts(removed)} {report.notes}")
    tally.update(["planned", *(["with notes"] if report.notes else [])])
    check_constraints(case, removed, report)
    assert np.array_equal(case.plan(budget.ratio)[0], removed)
    if budget.target == "channels":
        check_channels(case, removed, report)
    else:
        check_cost(case, removed)


def check(recipes: st.SearchStrategy[Recipe], examples: int, number: int, tally: collections.Counter[str]) -> None:
    @seed(number)
    @shard_settings(examples)
    @given(recipes, budgets())
    def law(recipe: Recipe, budget: Budget) -> None:
        hold(recipe, budget, tally)

    law()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_budgets_hold_on_random_networks(shard: int, tally: collections.Counter[str]) -> None:
    check(networks() | networks() | token_networks(), -(-EXAMPLES // SHARDS), 900 + shard, tally)
    assert tally["planned"] >= LEAST_MET * tally["networks"], f"too few plans: {tally}"


@pytest.mark.parametrize("kind", ["split", "slice", "chunks", "pick_one", "shuffle", "stack", "sums", "pad"])
def test_budgets_hold_around_pieces(kind: str, tally: collections.Counter[str]) -> None:
    check(networks_with(kind), max(6, EXAMPLES // 10), 950, tally)
