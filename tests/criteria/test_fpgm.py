from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stp_fx.criteria.fpgm as module
from stp_fx.criteria import Fpgm, ScoreContext


def by_loops(vectors: list[list[float]]) -> list[float]:
    return [sum(math.dist(a, b) for b in vectors) for a in vectors]


@settings(max_examples=30, deadline=None)
@given(units=st.integers(1, 11), width=st.integers(1, 4), block=st.sampled_from([1, 3, 512]), seed=st.integers(0, 99))
def test_distances_agree_with_loops_for_every_block(units, width, block, seed):
    vectors = torch.randn(units, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        sums = module._distance_sums(vectors)
    np.testing.assert_allclose(sums, by_loops(vectors.tolist()), rtol=1e-9, atol=1e-12)


def test_filters_are_those_of_the_first_output_axis(make_group, identity):
    tensors = {"a": torch.randn(5, 3, 2, 2), "b": torch.randn(2, 5)}
    group = make_group(tensors, [("a", 0, "weight", identity(5)), ("b", 1, "weight", identity(5))], 5)
    out, into = by_loops(tensors["a"].flatten(1).tolist()), by_loops(tensors["b"].T.tolist())
    np.testing.assert_allclose(Fpgm(reduction="first")(group, ScoreContext(tensors)).numpy(), out, rtol=1e-6)
    np.testing.assert_allclose(Fpgm()(group, ScoreContext(tensors)).numpy(), (np.array(out) + into) / 2, rtol=1e-6)


def test_positions_of_a_unit_are_one_vector(make_group):
    tensors = {"w": torch.randn(6, 3)}
    group = make_group(tensors, [("w", 0, "weight", {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2})], 3)
    vectors = [torch.cat([tensors["w"][k], tensors["w"][k + 3]]).tolist() for k in range(3)]
    np.testing.assert_allclose(Fpgm()(group, ScoreContext(tensors)).numpy(), by_loops(vectors), rtol=1e-6)


def test_the_median_goes_first_however_large(make_group, identity):
    """What tells it from a norm: the filter in the middle is the one that the others can stand in for."""
    tensors = {"w": torch.tensor([[10.0, 0.0], [11.0, 0.0], [12.0, 0.0], [1.0, 0.0]])}
    group = make_group(tensors, [("w", 0, "weight", identity(4))], 4)
    assert Fpgm()(group, ScoreContext(tensors)).argmin().item() in (0, 1)


def test_equal_filters_score_nothing_apart(make_group, identity):
    tensors = {"w": torch.full((4, 8), 0.1)}
    group = make_group(tensors, [("w", 0, "weight", identity(4))], 4)
    assert Fpgm(normalizer="gaussian")(group, ScoreContext(tensors)).tolist() == [0.0] * 4


def test_groups_without_weights_use_what_there_is(make_group, identity):
    tensors = {"s": torch.tensor([1.0, 2.0, 4.0]), "b": torch.tensor([0.0, 1.0, 1.0])}
    scaled = make_group(tensors, [("s", 0, "scale", identity(3)), ("b", 0, "bias", identity(3))], 3)
    assert Fpgm()(scaled, ScoreContext(tensors)).tolist() == [4.0, 3.0, 5.0]
    biased = make_group(tensors, [("b", 0, "bias", identity(3))], 3)
    assert Fpgm()(biased, ScoreContext(tensors)).tolist() == [2.0, 1.0, 1.0]
