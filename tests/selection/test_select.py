"""Targets and constraints, against loops that try every prefix."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stp_fx.analysis.groups import Group
from stp_fx.errors import InputError
from stp_fx.selection import select_units as select_with_notes


def select(*args, **options) -> np.ndarray:
    return select_with_notes(*args, **options).removed


def removed_per_group(groups: list[Group], removed: np.ndarray) -> list[int]:
    return [int(removed[group.units].sum()) for group in groups]


def pairwise_cost(groups: list[Group]) -> Callable[[np.ndarray], float]:
    """Like a chain of layers: the sum of products of neighbouring widths."""

    def cost(removed: np.ndarray) -> float:
        widths = [3, *((~removed[group.units]).sum() for group in groups), 10]
        return float(sum(a * b for a, b in itertools.pairwise(widths)))

    return cost


def allowed_by_loops(count: int, size: int, max_ratio: float, round_to: int) -> int:
    count = min(count, math.floor(max_ratio * size + 1e-9), size - 1)
    while count > 0 and (size - count) % round_to:
        count -= 1
    return max(count, 0)


def cut_by_loops(groups, scores, counts, total):
    removed = np.zeros(total, dtype=bool)
    for group, score, count in zip(groups, scores, counts, strict=True):
        for place in sorted(range(group.size), key=lambda k: (score[k], k))[:count]:
            removed[group.units[place]] = True
    return removed


def prefixes_by_loops(groups, scores, scope, exponents, max_ratio, round_to, total):
    """Every plan that the search may give, from the shortest prefix to the longest."""
    entries = []
    for place, (group, score) in enumerate(zip(groups, scores, strict=True)):
        order = sorted(range(group.size), key=lambda k: (score[k], k))
        largest = min(math.floor(max_ratio * group.size + 1e-9), group.size - 1)
        for rank, unit in enumerate(order[:largest]):
            local = 1 - (1 - (rank + 1) / group.size) ** exponents[group.index]
            if exponents[group.index] == 1:
                local = (rank + 1) / group.size
            entries.append((local if scope == "local" else score[unit], place, rank))
    entries.sort()
    plans = []
    for length in range(len(entries) + 1):
        raw = [sum(place == k for _, place, _ in entries[:length]) for k in range(len(groups))]
        counts = [allowed_by_loops(c, g.size, max_ratio, round_to) for c, g in zip(raw, groups, strict=True)]
        plans.append(cut_by_loops(groups, scores, counts, total))
    return plans


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    values = st.sampled_from([0.0, 1.0, 1.5, 2.0]) | st.floats(-5, 5)
    scores = [np.array(draw(st.lists(values, min_size=n, max_size=n))) for n in sizes]
    return {
        "sizes": sizes,
        "scores": scores,
        "ratio": draw(st.sampled_from([0.0, 0.25, 0.5, 0.9]) | st.floats(0, 0.99)),
        "scope": draw(st.sampled_from(["local", "global"])),
        "max_ratio": draw(st.sampled_from([1.0, 0.5, 0.75]) | st.floats(0.01, 1)),
        "round_to": draw(st.sampled_from([1, 1, 2, 4, 8])),
        "powers": [draw(st.integers(1, 3)) for _ in sizes],
    }


def leaves_room(problem) -> bool:
    """Whether the constraints let some group lose a unit; otherwise a ratio above 0 is an error."""
    limits = problem["max_ratio"], problem["round_to"]
    sizes = problem["sizes"]
    return problem["ratio"] == 0 or max(sizes) == 1 or any(allowed_by_loops(n, n, *limits) for n in sizes)


def run(make_groups, problem, target, **changes):
    groups = make_groups(problem["sizes"])
    exponents = {group.index: power for group, power in zip(groups, problem["powers"], strict=True)}
    options = {name: problem[name] for name in ("ratio", "scope", "max_ratio", "round_to")}
    arguments = {"total": sum(problem["sizes"]), "target": target, "exponents": exponents, **options, **changes}
    return groups, exponents, select(groups, problem["scores"], **arguments)


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_cost_targets_take_the_shortest_prefix_that_meets_them(make_groups, problem):
    assume(leaves_room(problem))
    groups = make_groups(problem["sizes"])
    cost = pairwise_cost(groups)
    exponents = {group.index: power for group, power in zip(groups, problem["powers"], strict=True)}
    total = sum(problem["sizes"])
    plans = prefixes_by_loops(
        groups, problem["scores"], problem["scope"], exponents, problem["max_ratio"], problem["round_to"], total
    )
    limit = (1 - problem["ratio"]) * cost(np.zeros(total, dtype=bool)) * (1 + 1e-12)
    expected = next((plan for plan in plans if cost(plan) <= limit), None)
    if expected is None:
        with pytest.raises(InputError, match=f"smallest in reach is {cost(plans[-1]):.6g}"):
            run(make_groups, problem, "macs", cost=cost)
        return
    _, _, removed = run(make_groups, problem, "macs", cost=cost)
    assert removed.dtype == bool
    assert removed.tolist() == expected.tolist()


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_channels_agree_with_loops(make_groups, problem):
    assume(leaves_room(problem))
    groups, exponents, removed = run(make_groups, problem, "channels")
    total, ratio = sum(problem["sizes"]), problem["ratio"]
    limits = problem["max_ratio"], problem["round_to"]
    if problem["scope"] == "local":
        counts = []
        for group in groups:
            power = exponents[group.index]
            fraction = ratio if power == 1 else 1 - (1 - ratio) ** (1 / power)
            counts.append(allowed_by_loops(math.floor(fraction * group.size + 1e-9), group.size, *limits))
        expected = cut_by_loops(groups, problem["scores"], counts, total)
    else:
        wanted = math.floor(ratio * total + 1e-9)
        plans = prefixes_by_loops(groups, problem["scores"], "global", exponents, *limits, total)
        expected = [plan for plan in plans if plan.sum() <= wanted][-1]
    assert removed.tolist() == expected.tolist()


@settings(max_examples=100, deadline=None)
@given(problem=problems(), target=st.sampled_from(["channels", "macs", "params"]))
def test_constraints_hold_in_every_plan(make_groups, problem, target):
    cost = pairwise_cost(make_groups(problem["sizes"]))
    try:
        groups, _, removed = run(make_groups, problem, target, cost=cost)
    except InputError:
        return
    for group, score in zip(groups, problem["scores"], strict=True):
        gone = removed[group.units]
        count, kept = int(gone.sum()), int((~gone).sum())
        assert kept >= 1
        assert count <= math.floor(problem["max_ratio"] * group.size + 1e-9)
        assert kept == group.size or kept % problem["round_to"] == 0
        if count > 0:
            assert score[gone].max() <= score[~gone].min()
    if problem["ratio"] == 0:
        assert not removed.any()
    elif target == "channels":
        assert removed.sum() <= problem["ratio"] * len(removed) + 1e-9


@settings(max_examples=60, deadline=None)
@given(problem=problems(), random=st.randoms(use_true_random=False), target=st.sampled_from(["channels", "macs"]))
def test_follows_permutations_within_groups(make_groups, problem, random, target):
    # distinct scores: ties go by position, on purpose
    problem["scores"] = [np.argsort(np.argsort(s, kind="stable")) + 0.1 * k for k, s in enumerate(problem["scores"])]
    cost = pairwise_cost(make_groups(problem["sizes"]))
    permutations = [random.sample(range(n), n) for n in problem["sizes"]]
    permuted = {**problem, "scores": [s[p] for s, p in zip(problem["scores"], permutations, strict=True)]}
    try:
        groups, _, removed = run(make_groups, problem, target, cost=cost)
    except InputError:
        with pytest.raises(InputError):
            run(make_groups, permuted, target, cost=cost)
        return
    _, _, removed_permuted = run(make_groups, permuted, target, cost=cost)
    for group, permutation in zip(groups, permutations, strict=True):
        assert removed_permuted[group.units].tolist() == removed[group.units][permutation].tolist()


def test_local_ratio_counts(make_groups):
    groups = make_groups([100, 64, 3, 1])
    scores = [np.random.default_rng(0).random(group.size) for group in groups]
    assert removed_per_group(groups, select(groups, scores, total=168, ratio=0.29)) == [29, 18, 0, 0]
    assert removed_per_group(groups, select(groups, scores, total=168, ratio=0.99)) == [99, 63, 2, 0]
    assert not select(groups, scores, total=168, ratio=0).any()


def test_global_takes_from_the_group_with_low_scores(make_groups):
    groups = make_groups([6, 4])
    scores = [np.arange(6) / 10, np.arange(4) + 5.0]
    removed = select(groups, scores, total=10, ratio=0.5, scope="global")
    assert removed_per_group(groups, removed) == [5, 0]
    # the last unit of the first group stays, so the second gives
    removed = select(groups, scores, total=10, ratio=0.7, scope="global")
    assert removed_per_group(groups, removed) == [5, 2]


def test_ratios_fix_groups_and_the_others_meet_the_target(make_groups):
    groups = make_groups([8, 8, 8])
    scores = [np.arange(8.0)] * 3
    removed = select(groups, scores, total=24, ratio=0.5, ratios={10: 0.25, 12: 0.0})
    assert removed_per_group(groups, removed) == [2, 4, 0]
    removed = select(groups, scores, total=24, ratio=0.25, ratios={10: 0.75}, scope="global")
    assert removed_per_group(groups, removed) == [6, 2, 2]
    cost = pairwise_cost(groups)
    whole = cost(np.zeros(24, dtype=bool))
    removed = select(groups, scores, total=24, ratio=0.4, ratios={10: 0.5}, target="macs", cost=cost)
    assert removed_per_group(groups, removed)[0] == 4
    assert cost(removed) <= 0.6 * whole
    assert not select(groups, scores, total=24, ratio=0.0, ratios={10: 0.0}, target="macs", cost=cost).any()


def test_groups_that_do_not_carry_stay_whole(make_groups):
    groups = make_groups([8, 8, 8])
    scores = [np.arange(8.0)] * 3
    for scope, expected in (("local", [4, 0, 4]), ("global", [4, 0, 4])):
        removed = select(groups, scores, total=24, ratio=0.5, exponents={10: 1, 12: 1}, scope=scope, ratios={11: 0.5})
        assert removed_per_group(groups, removed) == expected
    assert not select(groups, scores, total=24, ratio=0.5, exponents={}).any()


def test_product_factors_take_the_ratio_from_their_product(make_groups):
    groups = make_groups([12, 64])
    scores = [np.arange(12.0), np.arange(64.0)]
    removed = select(groups, scores, total=76, ratio=0.5, exponents={10: 2, 11: 2})
    heads, dims = removed_per_group(groups, removed)
    assert (12 - heads, 64 - dims) == (9, 46)


def test_units_outside_the_groups_are_kept(make_groups):
    groups = make_groups([4, 4])
    removed = select(groups[:1], [np.arange(4.0)], total=20, ratio=0.5)
    assert removed.shape == (20,)
    assert sorted(np.flatnonzero(removed)) == sorted(groups[0].units[:2].tolist())


def test_cost_is_met_within_one_unit_and_called_a_logarithm_of_times(make_groups):
    groups = make_groups([512] * 8)
    scores = [np.random.default_rng(k).random(512) for k in range(8)]
    calls = []
    real = pairwise_cost(groups)

    def cost(removed):
        calls.append(1)
        return real(removed)

    removed = select(groups, scores, total=4096, ratio=0.5, target="macs", cost=cost)
    limit = 0.5 * real(np.zeros(4096, dtype=bool))
    assert real(removed) <= limit
    assert limit - real(removed) <= 2 * 512
    assert len(calls) <= 16


@pytest.mark.parametrize("round_to", [1, 16])
def test_rounding_beyond_a_unit_is_said(make_groups, caplog, round_to):
    groups = make_groups([64, 64])
    scores = [np.arange(64.0)] * 2
    cost = pairwise_cost(groups)
    with caplog.at_level(logging.INFO, logger="stp_fx"):
        removed = select(groups, scores, total=128, ratio=0.3, target="macs", cost=cost, round_to=round_to)
    assert cost(removed) <= 0.7 * cost(np.zeros(128, dtype=bool))
    assert ("beyond by more than one unit" in caplog.text) == (round_to == 16)


def test_rounding_of_channels_and_limits_that_bind_are_said(make_groups, caplog):
    groups = make_groups([64, 64])
    scores = [np.arange(64.0)] * 2
    with caplog.at_level(logging.INFO, logger="stp_fx"):
        select(groups, scores, total=128, ratio=0.3, round_to=16)
        assert "asked to remove 38 channels, the plan removes 32" in caplog.text
        select(groups, scores, total=128, ratio=0.75, max_ratio=0.5, scope="global")
        assert "asked to remove 96 units" in caplog.text
        caplog.clear()
        select(groups, scores, total=128, ratio=0.25, round_to=16)
        assert not caplog.records


def test_no_groups():
    assert not select([], [], total=3, ratio=0.5).any()
    assert not select([], [], total=3, ratio=0.5, scope="global").any()
    with pytest.raises(InputError, match="smallest in reach is 5"):
        select([], [], total=3, ratio=0.5, target="params", cost=lambda removed: 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio must be in \[0, 1\)"),
        ({"ratio": float("nan")}, r"ratio must be in \[0, 1\)"),
        ({"ratio": "half"}, "got 'half'"),
        ({"ratio": True}, "got True"),
        ({"ratios": {10: 1.5}}, "ratio of group 'g0' must be in"),
        ({"scope": "worldwide"}, "unknown scope 'worldwide'; known: local, global, isomorphic"),
        ({"target": "joules"}, "unknown target 'joules'; known: channels, macs, params, latency"),
        ({"target": "macs"}, "needs a cost function"),
        ({"max_ratio": 0.0}, "max_ratio must be in"),
        ({"max_ratio": 1.1}, "max_ratio must be in"),
        ({"max_ratio": None}, "max_ratio must be in"),
        ({"round_to": 0}, "round_to must be an integer"),
        ({"round_to": 2.0}, "round_to must be an integer"),
        ({"round_to": True}, "round_to must be an integer"),
        ({"total": 3}, "unit 3 is out of range: the graph has 3 units"),
    ],
)
def test_bad_arguments(make_groups, change, message):
    with pytest.raises(InputError, match=message):
        select(make_groups([4]), [np.arange(4.0)], **{"total": 4, "ratio": 0.5, **change})
    with pytest.raises(InputError, match="got 0 for 1 groups"):
        select(make_groups([4]), [], total=4, ratio=0.5)
