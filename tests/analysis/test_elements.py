"""The algebra of factors: joining, splitting, regrouping, and what the solver makes of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp_fx.analysis.elements import Elements
from stp_fx.analysis.solve import solve
from stp_fx.rules import FIXED, Factor, dim_size, fixed_dim


def ids_of(dim):
    return None if len(dim) != 1 else dim[0].ids


def test_a_dimension_of_size_one_has_no_factor() -> None:
    elements = Elements()
    assert elements.new_dim(1) == ()
    assert fixed_dim(1) == ()
    assert dim_size(()) == 1


def test_unify_makes_one_class_of_two_axes() -> None:
    elements = Elements()
    a, b = elements.new_dim(3), elements.new_dim(3)
    elements.unify(a, b)
    label = solve(elements).label
    assert np.array_equal(label[ids_of(a)], label[ids_of(b)])
    assert len(set(label[ids_of(a)])) == 3


def test_meeting_fixed_positions_pins() -> None:
    elements = Elements()
    a = elements.new_dim(3)
    joined = elements.unify(a, fixed_dim(3))
    solution = solve(elements)
    assert joined == fixed_dim(3)
    assert solution.pinned[solution.label[ids_of(a)]].all()
    assert "cannot be removed" in elements.pins[0].reason


def test_only_the_fixed_part_of_a_mixed_axis_pins() -> None:
    elements = Elements()
    a, b = elements.new_dim(2), elements.new_dim(5)
    mixed = (Factor(5, np.concatenate([np.full(3, FIXED), ids_of(a)])),)
    elements.unify(b, mixed)
    solution = solve(elements)
    assert solution.pinned[solution.label[ids_of(b)]].tolist() == [True, True, True, False, False]
    assert np.array_equal(solution.label[ids_of(b)[3:]], solution.label[ids_of(a)])


def test_a_split_is_a_product_and_the_same_split_is_the_same_product() -> None:
    elements = Elements()
    (axis,) = elements.new_dim(12)
    first = elements.split(axis, [3, 4], None)
    second = elements.split(axis, [3, 4], None)
    assert [dim_size(d) for d in first] == [3, 4]
    assert all(ids_of(a) is ids_of(b) for a, b in zip(first, second, strict=True))
    assert len(elements.products) == 1


def test_a_side_that_does_not_vary_is_fixed() -> None:
    elements = Elements()
    (axis,) = elements.new_dim(3)
    flattened = Factor(12, elements.flat((axis, Factor(4, None))))
    outer, inner = elements.split(flattened, [3, 4], None)
    assert np.array_equal(ids_of(outer), axis.ids)
    assert inner == fixed_dim(4)
    assert elements.products == []


def test_flattening_a_split_gives_the_axis_back() -> None:
    elements = Elements()
    (axis,) = elements.new_dim(6)
    outer, inner = elements.split(axis, [2, 3], None)
    assert np.array_equal(elements.flat(outer + inner), axis.ids)
    assert np.array_equal(elements.flat(inner + outer), axis.ids.reshape(2, 3).T.ravel())


def test_products_of_one_axis_unify_factor_by_factor() -> None:
    elements = Elements()
    a, b = elements.new_dim(12), elements.new_dim(12)
    split_a, split_b = (elements.regroup([d], [3, 4]) for d in (a, b))
    elements.unify(a, b)
    label = solve(elements).label
    for x, y in zip(split_a, split_b, strict=True):
        assert np.array_equal(label[ids_of(x)], label[ids_of(y)])


def test_two_cuts_of_one_axis_are_refined() -> None:
    elements = Elements()
    a, b = elements.new_dim(24), elements.new_dim(24)
    (coarse, fine), (twelve, two) = elements.regroup([a], [4, 6]), elements.regroup([b], [12, 2])
    elements.unify(a, b)
    solution = solve(elements)
    label = solution.label
    assert not solution.pinned[label[ids_of(a)]].any()
    assert np.array_equal(label[ids_of(coarse)], label[elements.products[-1].factors[0]])
    assert solution.derived[label[ids_of(fine)]].all()
    assert solution.derived[label[ids_of(twelve)]].all()
    assert not solution.derived[label[ids_of(two)]].any()


def test_cuts_that_cross_pin_with_both_places_named() -> None:
    elements = Elements()
    a, b = elements.new_dim(6), elements.new_dim(6)
    elements.node = "first"
    elements.regroup([a], [2, 3])
    elements.node = "second"
    elements.regroup([b], [3, 2])
    elements.unify(a, b)
    solution = solve(elements)
    assert solution.pinned[solution.label[ids_of(a)]].all()
    reasons = [note.reason for note in elements.pins if note.node]
    assert any("first" in r and "second" in r for r in reasons)


def test_a_pinned_index_pins_its_factors() -> None:
    elements = Elements()
    (axis,) = elements.new_dim(6)
    outer, inner = elements.split(axis, [2, 3], None)
    elements.pin((Factor(1, axis.ids[[4]]),), "because")
    solution = solve(elements)
    assert solution.pinned[solution.label[ids_of(outer)]].tolist() == [False, True]
    assert solution.pinned[solution.label[ids_of(inner)]].tolist() == [False, True, False]


@st.composite
def _regroupings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    flat = [p for s in sizes for p in {1: [], 2: [2], 3: [3], 4: [2, 2], 6: [2, 3]}[s]]
    cuts, current = [], 1
    for prime in flat:
        current *= prime
        if draw(st.booleans()):
            cuts.append(current)
            current = 1
    return sizes, [*cuts, current]


@given(_regroupings())
def test_regrouping_keeps_every_position(case: tuple[list[int], list[int]]) -> None:
    """The elements of a view, flattened, are those of the original: directly, or as products of the same factors."""
    sizes, target = case
    elements = Elements()
    dims = [elements.new_dim(size) for size in sizes]
    result = elements.regroup(dims, target)
    assert [dim_size(d) for d in result] == target
    back = elements.regroup(result, sizes)
    assert [dim_size(d) for d in back] == sizes
    for before, after in zip(dims, back, strict=True):
        if before:
            assert np.array_equal(elements.flat(before), elements.flat(after))


@pytest.mark.parametrize("count", [10, 1000])
def test_unions_are_recorded_as_arrays(count: int) -> None:
    elements = Elements()
    dims = [elements.new_dim(64) for _ in range(count)]
    for a, b in itertools.pairwise(dims):
        elements.unify(a, b)
    assert len(elements.unions) == count - 1
    assert solve(elements).count == 65


def test_a_product_that_is_its_own_factor_is_pinned() -> None:
    """``x[:, :2] = x.view(2, 2).amax(0)``: the columns of four positions are the first two of them."""
    elements = Elements()
    whole = elements.new_dim(4)
    _, columns = elements.regroup([whole], [2, 2])
    elements.unions.append((whole[0].ids[:2], columns[0].ids))  # type: ignore[index,arg-type]
    solution = solve(elements)
    assert solution.pinned[solution.label[whole[0].ids]].all()  # type: ignore[index]
    assert solution.products == ()
    assert "an axis split into itself" in {note.reason for note in elements.pins}
