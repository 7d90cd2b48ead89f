from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_fx.criteria import NORMALIZERS, REDUCTIONS, normalize_scores, reduce_scores
from stp_fx.errors import CriterionError, InputError

scores_lists = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 7.0]) | st.floats(0, 100), min_size=1, max_size=20)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_agree_with_loops(reduction):
    local = np.random.default_rng(0).random((4, 6)) + 0.1
    loops = {
        "mean": lambda column: sum(column) / len(column),
        "max": max,
        "sum": sum,
        "prod": lambda column: float(np.prod(column)),
        "first": lambda column: column[0],
        "gate": lambda column: column[0],
    }
    expected = [loops[reduction](local[:, k].tolist()) for k in range(6)]
    np.testing.assert_allclose(reduce_scores(local, reduction), expected, rtol=1e-12)


def test_product_outside_float64_keeps_the_order():
    for size in (1e-9, 1e9):
        local = np.full((200, 4), size) * np.array([3.0, 1.0, 2.0, 4.0])
        product = reduce_scores(local, "prod")
        assert np.isfinite(product).all()
        assert np.argsort(product).tolist() == [1, 2, 0, 3]
        assert len(set(product.tolist())) == 4


def test_product_with_zeros_and_nan():
    assert reduce_scores(np.array([[0.0, 2.0], [3.0, 4.0]]), "prod").tolist() == [0.0, 8.0]
    assert reduce_scores(np.zeros((2, 2)), "prod").tolist() == [0.0, 0.0]
    assert np.isnan(reduce_scores(np.array([[np.nan, 2.0]] * 3), "prod")).tolist() == [True, False]
    tiny = np.full((200, 3), 1e-9) * np.array([1.0, 0.0, 2.0])
    assert np.argsort(reduce_scores(tiny, "prod")).tolist() == [1, 0, 2]


def lamp_by_loops(scores):
    return [s * s / sum(t * t for t in scores if t >= s) if any(scores) else 0.0 for s in scores]


@given(scores_lists)
@settings(max_examples=80, deadline=None)
def test_lamp_agrees_with_loops(scores):
    if any(0 < s < 1e-100 for s in scores):
        return
    result = normalize_scores(np.array(scores), "lamp")
    np.testing.assert_allclose(result, lamp_by_loops(scores), rtol=1e-9, atol=1e-200)


def test_lamp_of_the_largest_is_one_and_ties_are_equal():
    result = normalize_scores(np.array([1.0, 2.0, 1.0, 3.0]), "lamp")
    assert result[3] == 1.0
    assert result[0] == result[2] == pytest.approx(1 / 15)
    assert result[1] == pytest.approx(4 / 13)


def test_lamp_survives_extreme_scales_and_refuses_negatives():
    np.testing.assert_allclose(normalize_scores(np.array([3e200, 4e200]), "lamp"), [9 / 25, 1.0])
    with pytest.raises(CriterionError, match="negative"):
        normalize_scores(np.array([-1.0, 1.0]), "lamp")


def test_simple_normalizers():
    scores = np.array([1.0, 2.0, 3.0])
    assert normalize_scores(scores, "none") is scores
    np.testing.assert_allclose(normalize_scores(scores, "mean"), [0.5, 1.0, 1.5])
    np.testing.assert_allclose(normalize_scores(scores, "max"), [1 / 3, 2 / 3, 1.0])
    gaussian = normalize_scores(scores, "gaussian")
    assert gaussian.mean() == pytest.approx(0.0, abs=1e-12)
    assert gaussian.std() == pytest.approx(1.0)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_degenerate_groups_stay_finite(normalizer):
    for scores in (np.zeros(4), np.array([2.0]), np.full(5, 0.1), np.zeros(0)):
        result = normalize_scores(scores, normalizer)
        assert result.shape == scores.shape
        assert np.isfinite(result).all()
        assert len(set(result.tolist())) <= 1


@given(scores_lists, st.sampled_from(NORMALIZERS), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_normalizers_keep_order_and_follow_permutations(scores, normalizer, random):
    array = np.array(scores)
    result = normalize_scores(array, normalizer)
    order = np.argsort(array, kind="stable")
    assert (np.diff(result[order]) >= 0).all()
    permutation = list(range(len(scores)))
    random.shuffle(permutation)
    np.testing.assert_allclose(normalize_scores(array[permutation], normalizer), result[permutation], rtol=1e-9, atol=1e-9)


def test_unknown_names():
    with pytest.raises(InputError, match=r"unknown reduction 'median'; known: mean"):
        reduce_scores(np.ones((2, 2)), "median")
    with pytest.raises(InputError, match="unknown normalizer 'l2'"):
        normalize_scores(np.ones(2), "l2")
