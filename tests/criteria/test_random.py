from __future__ import annotations

import numpy as np
import pytest
import torch

from stp_fx.analysis.groups import Group
from stp_fx.criteria import Random, ScoreContext, score_groups
from stp_fx.errors import InputError


def group(index: int, units: int = 50) -> Group:
    return Group(index, f"g{index}", np.arange(units), ())


def test_a_function_of_seed_and_group_alone():
    first = Random(3)(group(0), ScoreContext({}))
    torch.manual_seed(123)
    np.random.seed(5)
    torch.rand(10)
    assert torch.equal(first, Random(3)(group(0), ScoreContext({}, seed=9)))
    assert torch.equal(first, Random()(group(0), ScoreContext({}, seed=3)))
    assert not torch.equal(first, Random(4)(group(0), ScoreContext({})))
    assert not torch.equal(first, Random(3)(group(1), ScoreContext({})))


def test_global_state_is_untouched_and_order_does_not_matter():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    forward = score_groups([group(0), group(1)], Random(), ScoreContext({}))
    backward = score_groups([group(1), group(0)], Random(), ScoreContext({}))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert torch.equal(forward[0], backward[1])
    assert torch.equal(forward[1], backward[0])


def test_range_and_spread():
    scores = Random(0)(group(0, 4000), ScoreContext({}))
    assert scores.dtype == torch.float64
    assert 0 <= scores.min() < 0.01
    assert 0.99 < scores.max() < 1
    assert abs(scores.mean().item() - 0.5) < 0.02
    assert len(set(scores.tolist())) == 4000


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_bad_seeds(seed):
    with pytest.raises(InputError, match="seed"):
        Random(seed)
    with pytest.raises(InputError, match="seed"):
        Random()(group(0), ScoreContext({}, seed=seed))
