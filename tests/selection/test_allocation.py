"""``allocation``: how much of each group is removed, by damages against an exact cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import stp_fx
from stp_fx.analysis.build import analyze
from stp_fx.criteria import score
from stp_fx.errors import InputError, TargetError
from stp_fx.measure.statistics import collect_statistics
from stp_fx.passes import CollectStatistics, MeasureDamage, Pipeline, ScoreUnits, SelectUnits
from stp_fx.rewrite.compensation import LeastSquares
from stp_fx.selection import Selection, choose
from stp_fx.selection import select_units as select
from stp_fx.selection.damage import measure_damages

SHARED = {"target": "macs", "criterion": "reconstruction", "ratio": 0.5}


def bilinear(groups: Any) -> Any:
    """A chain of layers: each costs the product of what is kept before and after it."""

    def cost(removed: np.ndarray) -> float:
        kept = [3.0, *(float((~removed[g.units]).sum()) for g in groups), 2.0]
        return sum(a * b for a, b in itertools.pairwise(kept))

    return cost


def counts(groups: Any, found: Any) -> tuple[int, ...]:
    return tuple(int(found.removed[g.units].sum()) for g in groups)


def total(curves: Sequence[np.ndarray], removed: Sequence[int]) -> float:
    return float(sum(curve[k] for curve, k in zip(curves, removed, strict=True)))


def rising(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(rng.random(size) ** 3)])


@example([2, 4, 2], 0.59375, 1)  # one group takes what another gives back
@given(st.lists(st.integers(2, 7), min_size=1, max_size=3), st.floats(0.05, 0.6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_near_the_least_damage_of_all_plans_that_meet_the_cost(
    make_groups: Any, sizes: list[int], ratio: float, seed: int
) -> None:
    groups, rng = make_groups(sizes), np.random.default_rng(seed)
    cost, curves = bilinear(groups), [rising(rng, size) for size in sizes]
    scores = [rng.random(size) for size in sizes]

    def flags(removed: Sequence[int]) -> np.ndarray:
        found = np.zeros(sum(sizes), dtype=bool)
        for group, values, k in zip(groups, scores, removed, strict=True):
            found[group.units[np.argsort(values)[:k]]] = True
        return found

    limit = (1 - ratio) * cost(np.zeros(sum(sizes), dtype=bool)) * (1 + 1e-12)
    possible = [c for c in itertools.product(*(range(size) for size in sizes)) if cost(flags(c)) <= limit]

    def run() -> Any:
        return select(groups, scores, total=sum(sizes), ratio=ratio, target="macs", cost=cost, damages=curves)

    if not possible:
        with pytest.raises(TargetError):
            run()
        return
    found = run()
    mine, best = counts(groups, found), min(total(curves, c) for c in possible)
    assert mine in possible
    assert (found.removed == flags(mine)).all()  # which units: the scores alone say it
    assert found.damage == pytest.approx(total(curves, mine))
    # A local search over a bilinear cost. Measured over 197 such draws: the best in 99 %; at worst, 4 % of all damage beyond it.
    assert total(curves, mine) <= best + 0.1 * total(curves, sizes) + 1e-9
    for k in range(len(sizes)):  # no unit is removed that could have been kept
        back = list(mine)
        back[k] -= 1
        assert mine[k] == 0 or cost(flags(back)) > limit


def test_the_group_that_hurts_least_pays(make_groups: Any) -> None:
    groups = make_groups([10, 10])
    curves = [np.arange(11.0), np.arange(11.0) * 100]

    def cost(removed: np.ndarray) -> float:
        return float((~removed).sum())

    found = select(groups, [np.arange(10.0)] * 2, total=20, ratio=0.4, target="macs", cost=cost, damages=curves)
    assert counts(groups, found) == (8, 0)
    found = select(groups, [np.arange(10.0)] * 2, total=20, ratio=0.5, target="channels", damages=curves)
    assert counts(groups, found) == (9, 1)
    assert found.damage == 109.0


def test_a_curve_that_is_not_convex_is_not_followed_greedily(make_groups: Any) -> None:
    """The first unit of the second group is dear and the next four are free: unit by unit, it would never be begun."""
    groups = make_groups([6, 6])
    curves = [np.array([0, 1, 2, 3, 4, 5, 6.0]), np.array([0, 2.5, 2.5, 2.5, 2.5, 2.5, 9.0])]

    def cost(removed: np.ndarray) -> float:
        return float((~removed).sum())

    found = select(groups, [np.arange(6.0)] * 2, total=12, ratio=5 / 12, target="macs", cost=cost, damages=curves)
    assert counts(groups, found) == (0, 5)


@pytest.mark.parametrize("target", ["macs", "channels"])
def test_constraints_hold(make_groups: Any, target: str) -> None:
    groups = make_groups([16, 16, 16])
    scores = [np.arange(16.0)] * 3
    cheap = [np.zeros(17), np.arange(17.0), np.arange(17.0)]
    found = select(
        groups, scores, total=48, ratio=0.4, target=target, cost=bilinear(groups), damages=cheap,
        round_to=4, max_ratio=0.5, ratios={groups[2].index: 0.25},
    )  # fmt: skip
    removed = counts(groups, found)
    assert all(k % 4 == 0 and k <= 8 for k in removed)
    assert removed[2] == 4  # its own ratio
    assert removed[:2] == ((4, 4) if target == "macs" else (8, 4))


def test_a_piece_keeps_its_last_unit(make_groups: Any) -> None:
    groups = make_groups([4, 4])
    piece = groups[0].units[:3]
    found = select(
        groups,
        [np.arange(4.0)] * 2,
        total=8,
        ratio=0.375,
        target="channels",
        damages=[np.zeros(5), np.arange(5.0)],
        pieces=[piece],
    )
    assert counts(groups, found) == (3, 0)
    assert not found.removed[piece].all()


def test_a_ratio_of_zero_removes_nothing_even_where_it_costs_nothing(make_groups: Any) -> None:
    groups = make_groups([4, 4])
    found = select(
        groups, [np.arange(4.0)] * 2, total=8, ratio=0.0, target="macs", cost=bilinear(groups), damages=[np.zeros(5)] * 2
    )
    assert not found.removed.any()


def test_what_goes_beyond_the_target_is_said(make_groups: Any) -> None:
    groups = make_groups([16, 16])
    scores, curves = [np.arange(16.0)] * 2, [np.arange(17.0)] * 2

    def cost(removed: np.ndarray) -> float:
        return float((~removed).sum())

    found = select(groups, scores, total=32, ratio=0.3, target="macs", cost=cost, damages=curves, round_to=8)
    assert [s.constraints for s in found.shortfalls][:1] == [("round_to",)]
    assert "round_to=8: asked to remove 0.3000 of the macs, the plan removes 0.5000" in found.notes[0]
    with pytest.raises(TargetError, match="lower `ratio`"):
        select(groups, scores, total=32, ratio=0.99, target="macs", cost=cost, damages=curves)


# -- a function of the user's ------------------------------------------------------------------------------------------


def chain(widths: Sequence[int] = (16, 24, 32)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


def data(batches: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(batches)]


def test_a_function_decides() -> None:
    gm = stp_fx.trace(chain(), data()[0])
    asked: dict[str, Sequence[float]] = {}

    def damages(group: str, fractions: Sequence[float]) -> list[float]:
        asked[group] = fractions
        return [100 * f if group.startswith("0.") else f for f in fractions]

    pruned = stp_fx.prune_graph(gm, ratio=0.4, target="macs", allocation=damages)
    assert set(asked) == {group.name for group in analyze(gm).groups}
    assert all(list(f) == sorted(set(f)) and f[0] > 0 and f[-1] < 1 and len(f) <= 16 for f in asked.values())
    assert pruned.get_parameter("0.weight").shape[0] == 16  # too dear
    assert stp_fx.cost(pruned).macs <= 0.6 * stp_fx.cost(gm).macs
    again = stp_fx.prune_graph(
        gm, ratio=0.4, target="macs", allocation=lambda g, f: torch.tensor([x * (1 if g.startswith("0.") else 100) for x in f])
    )
    assert again.get_parameter("0.weight").shape[0] < 16


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            lambda group, fractions: [0.0],
            r"must give one finite damage of at least 0 for each of 15 fractions of group '0.weight:0'",
        ),
        (lambda group, fractions: [float("nan") for _ in fractions], "must give one finite damage"),
        (lambda group, fractions: [-1.0 for _ in fractions], "must give one finite damage"),
        (lambda group, fractions: ["much" for _ in fractions], "must give one finite damage"),
        (lambda group, fractions: None, "must give one finite damage"),
        (lambda group: [], r"fails on group '0.weight:0' with TypeError.*it is called \(group, fractions\)"),
    ],
)
def test_a_function_that_gives_no_damages_is_refused(function: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        stp_fx.prune_graph(chain(), ratio=0.4, target="macs", example_inputs=data()[0], allocation=function)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allocation": "best"}, r"`allocation` is 'scope', 'optimal' or a function \(group, fractions\) -> damages; got 'best'"),
        ({"allocation": None}, "got None"),
        ({"allocation": "optimal", "scope": "global"}, "scope='global': leave one of them out"),
        ({"allocation": "optimal", "uniform": True}, "uniform=True: leave one of them out"),
        ({"allocation": len, "scope": "isomorphic"}, "scope='isomorphic': leave one of them out"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Selection(0.5, **options)


def test_it_is_printed_and_read_back() -> None:
    assert repr(Selection(0.5, allocation="optimal")) == "Selection(0.5, allocation='optimal')"
    select = "SelectUnits(0.5, target='macs', allocation='optimal')"
    text = f"Pipeline(ScoreUnits(criterion='variance'), MeasureDamage(samples=8), {select})"
    pipeline = Pipeline.parse(text, calibration=data())
    assert str(pipeline) == text


def test_data_that_is_missing_is_asked_for() -> None:
    gm = stp_fx.trace(chain(), data()[0])
    with pytest.raises(InputError, match=r"allocation='optimal' measures damages: give `calibration`"):
        stp_fx.prune_graph(gm, target="macs", allocation="optimal")
    with pytest.raises(InputError, match=r"give `calibration`"):
        stp_fx.sweep(gm, [0.5], target="macs", allocation="optimal")
    with pytest.raises(InputError, match=r"give `train_loader`"):
        stp_fx.PATPassManager(gm, target="macs", allocation="optimal")
    scored = ScoreUnits("magnitude")(gm).artifacts
    with pytest.raises(InputError, match="run MeasureDamage between ScoreUnits and SelectUnits"):
        SelectUnits(0.5, target="macs", allocation="optimal")(gm, scored)
    with pytest.raises(stp_fx.errors.PassError, match="MeasureDamage needs statistics"):
        MeasureDamage(data())(gm, scored)
    plain = CollectStatistics(data())(gm, scored).artifacts
    with pytest.raises(InputError, match="have no covariance; collect them with covariance=True"):
        MeasureDamage(data())(gm, plain)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 0}, "`samples` is a whole number from 1"),
        ({"compensation": "most"}, "unknown compensation 'most'; known: None, 'mean', 'least_squares'"),
        ({"fractions": (0.5, 0.25)}, "give fractions of a group, rising"),
        ({"fractions": (0.0,)}, "give fractions of a group, rising"),
        ({"fractions": 0.5}, "give fractions of a group, rising"),
    ],
)
def test_bad_arguments_of_the_pass_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        MeasureDamage(data(), **options)


def test_damages_of_other_weights_or_other_groups_are_refused() -> None:
    gm, other = (stp_fx.trace(chain(widths), data()[0]) for widths in ((16, 24, 32), (16, 24, 40)))
    scores = score(gm)
    damages = measure_damages(gm, scores, collect_statistics(gm, data(), covariance=True), data())
    assert repr(damages) == "Damages(3 groups)"
    with pytest.raises(InputError, match="measure them again on this graph"):
        choose(other, score(other), Selection(0.5, allocation="optimal"), damages=damages)
    some = type(damages)({"0.weight:0": damages.curves["0.weight:0"]}, damages.stamp)
    with pytest.raises(InputError, match=r"no curve for group '3.weight:0'"):
        choose(gm, scores, Selection(0.5, allocation="optimal"), damages=some)


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["macs", "params", "latency"])
def test_every_cost_is_met(target: Any) -> None:
    gm = stp_fx.trace(chain(), torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    batches = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))]
    pruned = stp_fx.prune_graph(gm, "variance", 0.3, target=target, allocation="optimal", calibration=batches)
    report = stp_fx.report_of(pruned)
    assert report is not None
    assert any(group.removed for group in report.groups)
    if target != "latency":
        before, after = getattr(report, target)
        assert after <= 0.7 * before
        assert after == getattr(stp_fx.cost(pruned), target)


def test_the_scope_is_what_it_was_without_an_allocation() -> None:
    gm = stp_fx.trace(chain(), data()[0])
    scores = score(gm)
    for scope in ("local", "global"):
        plain = choose(gm, scores, Selection(0.5, scope=scope, target="macs"))
        assert plain.damage is None
        named = choose(gm, scores, Selection(0.5, scope=scope, target="macs", allocation="scope"))
        assert (plain.removed == named.removed).all()


def test_it_beats_the_scopes_where_one_layer_is_worth_nothing() -> None:
    """A wide layer that hardly reaches the output: every scope takes its share from layers that matter."""
    model = chain((32, 32, 32))
    with torch.no_grad():
        for k in (24, *range(25, 32)):
            model[3].weight[k] = model[3].weight[k - 8]  # eight of the second layer's outputs are copies of others
            model[3].bias[k] = model[3].bias[k - 8]
    gm = stp_fx.trace(model, data()[0])
    batches = data()

    def error(**options: Any) -> float:
        pruned = stp_fx.prune_graph(
            gm, "reconstruction", 0.15, target="macs", calibration=batches, compensation="least_squares", **options
        )
        with torch.no_grad():
            return sum(float((pruned(x) - gm(x)).square().sum() / gm(x).square().sum()) for x in batches)

    assert error(allocation="optimal") < 0.5 * min(error(scope=scope) for scope in ("local", "global", "isomorphic"))


def test_a_sweep_is_a_front() -> None:
    gm = stp_fx.trace(chain(), data()[0])
    swept = stp_fx.sweep(gm, [0.2, 0.4, 0.6], "variance", target="macs", allocation="optimal", calibration=data())
    costs = [entry.report.macs[1] for entry in swept.entries]
    damages = [entry.damage for entry in swept.entries]
    assert costs == sorted(costs, reverse=True)
    assert all(each is not None for each in damages)
    assert damages == sorted(damages)  # type: ignore[type-var]
    assert "damage" in str(swept)
    assert swept.to_dict()["entries"][0]["damage"] == damages[0]
    plain = stp_fx.sweep(gm, [0.2], target="macs")
    assert "damage" not in str(plain)
    assert "damage" not in plain.to_dict()["entries"][0]


@pytest.mark.parametrize("mask_until_last", [True, False])
def test_pruning_aware_training_allocates_at_every_step(mask_until_last: bool) -> None:
    loader = data()
    gm = stp_fx.trace(chain(), loader[0])
    before = stp_fx.cost(gm).macs
    pat = stp_fx.PATPassManager(
        gm, criterion="magnitude", ratio=0.5, steps=2, target="macs", allocation="optimal", train_loader=loader,
        mask_until_last=mask_until_last,
    )  # fmt: skip
    assert pat.prune(0)
    assert pat.prune(1)
    assert stp_fx.cost(pat.model).macs <= 0.5 * before
    assert torch.isfinite(pat.model(loader[0])).all()


def test_measured_damages_are_the_errors_of_the_output() -> None:
    """At a measured fraction, the curve is the error that one sees when the group alone is masked and compensated."""
    gm, batches = stp_fx.trace(chain(), data()[0]), data()
    statistics = collect_statistics(gm, batches, covariance=True, maps=True, patches=1152)
    scores = score(gm)
    damages = measure_damages(gm, scores, statistics, batches, method=LeastSquares(), samples=48, fractions=(0.25, 0.75))
    group, values = scores.groups[1], scores.values[1].numpy()
    removed = np.zeros(analyze(gm).units, dtype=bool)
    removed[group.units[np.argsort(values, kind="stable")[:18]]] = True
    plan = analyze(gm).plan_removing(removed)
    changed = stp_fx.rewrite.compensation.compensate(gm, plan, statistics, LeastSquares())[0]
    masked = stp_fx.rewrite.removal.mask(changed, plan)
    with torch.no_grad():
        whole = torch.cat([gm(x) for x in batches]).double()
        found = torch.cat([masked(x) for x in batches]).double()
    error = float((found - whole).square().sum() / (whole - whole.mean(0)).square().sum())
    assert damages.curves[group.name][18] == pytest.approx(error, rel=1e-4)
    assert all((np.diff(curve) >= 0).all() and curve[0] == 0 for curve in damages.curves.values())
