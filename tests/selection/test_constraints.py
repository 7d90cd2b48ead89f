"""Constraints that bind: the errors, the notes, and ratios that conflict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stp_fx.errors import InputError, TargetError
from stp_fx.selection import Shortfall, merge_ratios
from stp_fx.selection import select_units as select


def widths_product(groups):
    return lambda removed: float(np.prod([(~removed[group.units]).sum() for group in groups]))


def test_a_piece_keeps_its_best_unit_and_counts_stay_multiples(make_groups):
    groups = make_groups([16])
    pieces = np.split(groups[0].units, 4)
    scores = [np.arange(16.0)]
    found = select(groups, scores, total=16, ratio=0.75, round_to=4, pieces=pieces, target="macs", cost=widths_product(groups))
    assert np.flatnonzero(~found.removed[groups[0].units]).tolist() == [3, 7, 11, 15]
    assert found.shortfalls == (Shortfall("g0", 0, 12, 16, ("pieces",), (3, 7, 11)),)
    assert found.notes == ("the last unit of a piece of a tensor is kept, whatever its score, of 'g0' (units 3, 7, 11)",)
    with pytest.raises(TargetError) as error:
        select(groups, scores, total=16, ratio=0.8, round_to=4, pieces=pieces, target="macs", cost=widths_product(groups))
    assert str(error.value) == (
        "target 'macs' with ratio 0.8 asks for at most 3.2 macs of 16, but the smallest in reach is 4 (ratio 0.75); "
        "held back by: pieces (1 group), round_to=4 (1 group); lower `ratio`, or relax one of these"
    )


def test_units_are_only_held_for_the_counts_at_hand(make_groups):
    groups = make_groups([8])
    pieces = [groups[0].units[:2], groups[0].units[2:4]]
    found = select(groups, [np.arange(8.0)], total=8, ratio=0.25, pieces=pieces)
    assert np.flatnonzero(found.removed[groups[0].units]).tolist() == [0, 2]
    assert found.shortfalls[0].kept == (1,)
    found = select(groups, [np.arange(8.0)], total=8, ratio=0.25, pieces=pieces[1:])
    assert np.flatnonzero(found.removed[groups[0].units]).tolist() == [0, 1]
    assert not found.notes


def test_a_piece_over_two_groups_keeps_its_last_unit_in_the_order(make_groups):
    groups = make_groups([4, 4])
    piece = np.concatenate([groups[0].units[:2], groups[1].units[:2]])
    scores = [np.array([0.0, 1.0, 8.0, 9.0]), np.array([2.0, 0.5, 8.0, 9.0])]
    found = select(groups, scores, total=8, ratio=0.5, scope="global", pieces=[piece])
    assert sorted(np.flatnonzero(found.removed)) == sorted([*groups[0].units[:3], groups[1].units[1]])
    # the group without a ratio of its own holds the unit
    found = select(groups, scores, total=8, ratio=0.5, ratios={11: 0.5}, pieces=[piece])
    assert np.flatnonzero(found.removed[groups[1].units]).tolist() == [0, 1]
    assert np.flatnonzero(found.removed[groups[0].units]).tolist() == [0, 2]


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("target", ["channels", "macs"])
@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"round_to": 10**6}, r"round_to=1000000 lets no group lose a unit.*the largest group, 'g1', has 16 units.*below 16"),
        ({"round_to": 16}, r"round_to=16 lets no group lose a unit"),
        ({"max_ratio": 0.01}, r"max_ratio=0.01 lets no group lose a unit.*'g1', has 16 units.*at least 0\.0625"),
        ({"max_ratio": 0.2, "round_to": 8}, r"max_ratio=0.2 and round_to=8 together"),
    ],
)
def test_constraints_that_let_nothing_be_removed_are_errors(make_groups, scope, target, constraint, message):
    groups = make_groups([8, 16])
    arguments = {"total": 24, "scope": scope, "target": target, "classes": [0, 1], "cost": widths_product(groups), **constraint}
    scores = [np.arange(8.0), np.arange(16.0)]
    with pytest.raises(InputError, match=message):
        select(groups, scores, ratio=0.5, **arguments)
    with pytest.raises(InputError, match=message):
        select(groups, scores, ratio=0.0, ratios={10: 0.5}, **arguments)
    assert not select(groups, scores, ratio=0.0, **arguments).removed.any()
    # groups that were larger once have already lost what they may
    if target == "channels":
        assert not select(groups, scores, ratio=0.5, **arguments, whole={10: 10**7, 11: 10**7}).removed[groups[0].units].any()


def test_groups_that_stay_whole_are_named(make_groups):
    groups = make_groups([4, 16, 4, 4, 4])
    scores = [np.arange(float(group.size)) for group in groups]
    found = select(groups, scores, total=32, ratio=0.5, round_to=8)
    assert [int(found.removed[group.units].sum()) for group in groups] == [0, 8, 0, 0, 0]
    assert found.shortfalls[0] == Shortfall(None, 16, 8, 32, ("round_to",))
    assert found.shortfalls[1] == Shortfall("g0", 2, 0, 4, ("round_to",))
    assert found.notes == (
        "asked to remove 16 channels, the plan removes 8 of 32 (0.25 at ratio 0.5): round_to=8",
        "round_to=8 lets no unit be removed of 'g0' (4 units), 'g2' (4 units), 'g3' (4 units) and 1 more",
    )
    found = select(groups, scores, total=32, ratio=0.1, round_to=8, target="macs", cost=lambda removed: float((~removed).sum()))
    assert found.shortfalls[1].asked is None
    assert found.notes[-1].startswith("round_to=8 lets no unit be removed of 'g0' (4 units)")


def test_a_ratio_of_its_own_that_cannot_be_met_is_named(make_groups):
    groups = make_groups([16, 16])
    found = select(groups, [np.arange(16.0)] * 2, total=32, ratio=0.5, ratios={10: 0.7}, round_to=8, scope="global")
    assert "groups with a ratio of their own lose fewer units than asked: 'g0' loses 8 of 11 units (round_to=8)" in found.notes


def test_ratios_that_go_beyond_the_target_are_told(make_groups):
    groups = make_groups([8, 8])
    cost = widths_product(groups)
    found = select(groups, [np.arange(8.0)] * 2, total=16, ratio=0.25, ratios={10: 0.75}, target="macs", cost=cost)
    assert found.shortfalls == (Shortfall(None, 0.25, 0.75, 1.0, ("ratios",)),)
    assert found.notes[0].startswith("ratios: asked to remove 0.2500 of the macs, the plan removes 0.7500")


def test_out_of_reach_names_every_constraint(make_groups):
    groups = make_groups([8, 16, 8, 8])
    scores = [np.arange(float(group.size)) for group in groups]
    pieces = np.split(groups[3].units, 4)
    with pytest.raises(TargetError) as error:
        select(
            groups, scores, total=44, ratio=0.9, target="macs", cost=lambda removed: float((~removed).sum()),
            exponents={10: 1, 11: 1, 13: 1}, ratios={10: 0.25}, max_ratio=0.8, round_to=4, pieces=pieces,
        )  # fmt: skip
    why = str(error.value).split("held back by: ")[1]
    for part in ("max_ratio=0.8 (2 groups)", "round_to=4 (", "pieces (1 group)", "ratios (1 group)", "products (1 group)"):
        assert part in why
    assert "ignore (4 of 44 units are outside the groups)" in why
    with pytest.raises(TargetError, match=r"held back by: every group keeps one unit; lower `ratio`$"):
        select(make_groups([2]), [np.zeros(2)], total=2, ratio=0.9, target="macs", cost=lambda removed: float((~removed).sum()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, np.bool_(True), np.array(0.5), None, "0.5", 1.0])
@pytest.mark.parametrize("where", ["ratio", "ratios", "merge"])
def test_ratios_that_are_no_ratios(make_groups, value, where):
    groups = make_groups([4])
    given = {"ratio": value} if where == "ratio" else {"ratio": 0.5, "ratios": {10: value}}
    with pytest.raises(InputError, match=r"must be in \[0, 1\), the fraction to remove; got "):
        merge_ratios([("layer", value, groups)]) if where == "merge" else select(groups, [np.arange(4.0)], total=4, **given)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.float16(0.5)])
def test_numpy_scalars_are_numbers(make_groups, value):
    groups = make_groups([8])
    found = select(groups, [torch.arange(8.0)], total=8, ratio=value, max_ratio=np.float32(0.75), round_to=np.int64(2))
    assert int(found.removed.sum()) == 4
    found = select(groups, [torch.arange(8.0)], total=8, ratio=0, ratios={10: value})
    assert int(found.removed.sum()) == 4


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([np.array([0, 4])], r"pieces\[0\] names units from 0 to 4; the graph has 4 units"),
        ([np.array([1]), np.array([-1])], r"pieces\[1\] names units from -1"),
        ([np.array([0.5])], r"pieces\[0\] must be a one-dimensional array of unit ids"),
        ([np.array([[1]])], "one-dimensional"),
        ([[0, 1]], "must be a one-dimensional array"),
    ],
)
def test_pieces_that_are_none(make_groups, pieces, message):
    with pytest.raises(InputError, match=message):
        select(make_groups([4]), [np.arange(4.0)], total=4, ratio=0.5, pieces=pieces)


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_edges(make_groups, scope):
    # groups of one unit lose nothing, and there is nothing to say of them in the local scope
    ones = make_groups([1, 1])
    found = select(ones, [np.zeros(1)] * 2, total=2, ratio=0.5, scope=scope, classes=[0, 0])
    assert not found.removed.any()
    assert bool(found.notes) == (scope != "local")
    # equal scores: channel order
    equal = make_groups([6, 6])
    found = select(equal, [np.zeros(6)] * 2, total=12, ratio=0.5, scope=scope, classes=[0, 1], pieces=[equal[0].units[:2]])
    assert np.flatnonzero(found.removed[equal[0].units])[:2].tolist() == [0, 2]
    # no groups
    for target in ("channels", "macs"):
        found = select([], [], total=2, ratio=0.0, scope=scope, classes=[], target=target, cost=lambda removed: 3.0)
        assert (found.removed.tolist(), found.shortfalls, found.notes) == ([False, False], (), ())


def test_names_that_share_a_group_need_one_ratio(make_groups):
    first, second = make_groups([4, 4])
    assert merge_ratios([("a", 0.5, [first]), ("b", np.float32(0.25), [second]), ("c", 0.5, [first])]) == {10: 0.5, 11: 0.25}
    assert merge_ratios([]) == {}
    with pytest.raises(InputError) as error:
        merge_ratios([("a", 0.5, [first]), ("b", 0.25, [second, first])])
    assert str(error.value) == (
        "`ratios` gives 'a' the ratio 0.5 and 'b' the ratio 0.25, but both are of the group 'g0', whose channels are removed "
        "together: give the two names one ratio, or leave one of them out"
    )
