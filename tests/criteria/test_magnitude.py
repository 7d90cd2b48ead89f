from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stp_fx.criteria.magnitude as module
from stp_fx.analysis.groups import Axis, Group, Member
from stp_fx.criteria import Magnitude, ScoreContext, lamp, score_groups
from stp_fx.errors import CriterionError, InputError


def norm_by_loops(tensor: torch.Tensor, dim: int, positions: dict[int, int], units: int, p: float) -> list[float]:
    sums = [0.0] * units
    for position, unit in positions.items():
        for value in tensor.detach().double().select(dim, position).flatten().tolist():
            sums[unit] += abs(value) ** p
    return [total ** (1 / p) for total in sums]


def small_network() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=g),
        "conv.bias": torch.randn(4, generator=g),
        "bn.weight": torch.randn(4, generator=g),
        "bn.running_mean": torch.randn(4, generator=g),
        "fc.weight": torch.randn(5, 8, generator=g),
        "steps": torch.tensor(3),
    }


FLATTENED = {position: position // 2 for position in range(8)}


@pytest.fixture
def group(make_group, identity):
    return make_group(
        small_network(),
        [
            ("bn.running_mean", 0, "buffer", identity(4)),
            ("bn.weight", 0, "scale", identity(4)),
            ("conv.bias", 0, "bias", identity(4)),
            ("conv.weight", 0, "weight", identity(4)),
            ("fc.weight", 1, "weight", FLATTENED),
        ],
        units=4,
    )


@pytest.mark.parametrize("p", [1.0, 2.0, 3, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "max", "sum", "prod", "first", "gate"])
def test_agrees_with_loops(group, identity, p, reduction):
    tensors = small_network()
    local = np.array(
        [
            norm_by_loops(tensors["bn.weight"], 0, identity(4), 4, p),
            norm_by_loops(tensors["conv.weight"], 0, identity(4), 4, p),
            norm_by_loops(tensors["fc.weight"], 1, FLATTENED, 4, p),
        ]
    )
    expected = {
        "mean": local.mean(0), "max": local.max(0), "sum": local.sum(0), "prod": local.prod(0),
        "first": local[1], "gate": local[1],
    }[reduction]  # fmt: skip
    scores = Magnitude(p, reduction)(group, ScoreContext(tensors))
    assert scores.dtype == torch.float64
    assert scores.shape == (4,)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6)


def test_one_tensor_on_two_axes_counts_on_both(make_group, identity):
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    group = make_group({"w": weight}, [("w", 0, "weight", identity(3)), ("w", 1, "weight", identity(3))], units=3)
    expected = (weight.norm(dim=1) + weight.norm(dim=0)) / 2
    torch.testing.assert_close(Magnitude()(group, ScoreContext({"w": weight})).float(), expected)


def test_a_weight_is_read_once_for_all_groups_and_axes(make_group, identity, monkeypatch):
    calls = []
    real = module.power_sums
    monkeypatch.setattr(module, "power_sums", lambda t, p, dims: calls.append(tuple(dims)) or real(t, p, dims))
    tensors = {"a": torch.randn(4, 6)}
    outputs = make_group(tensors, [("a", 0, "weight", identity(4))], units=4, index=0)
    left = make_group(tensors, [("a", 1, "weight", {0: 0, 1: 1, 2: 2})], units=3, index=1)
    right = make_group(tensors, [("a", 1, "weight", {3: 0, 4: 1, 5: 1})], units=2, index=2)
    context = ScoreContext(tensors)
    scores = score_groups([outputs, left, right], Magnitude(), context)
    assert calls == [(0, 1)]
    torch.testing.assert_close(scores[1].float(), tensors["a"].norm(dim=0)[:3])
    torch.testing.assert_close(scores[2][1].float(), tensors["a"][:, 4:].norm())
    score_groups([left], Magnitude(p=1.0), context)
    assert calls == [(0, 1), (1,)]


def test_groups_without_weights_fall_back_to_their_other_parameters(make_group, identity):
    tensors = {"token": torch.tensor([[3.0, 1.0]]), "shift": torch.tensor([4.0, 1.0]), "mean": torch.ones(2)}
    touches = [
        ("mean", 0, "buffer", identity(2)),
        ("token", 1, "other", identity(2)),
        ("shift", 0, "bias", identity(2)),
    ]
    assert Magnitude()(make_group(tensors, touches, 2), ScoreContext(tensors)).tolist() == [3.5, 1.0]
    assert Magnitude(reduction="first")(make_group(tensors, touches, 2), ScoreContext(tensors)).tolist() == [3.0, 1.0]
    with pytest.raises(CriterionError, match=r"group0.*no parameter to score.*mean:0"):
        Magnitude()(make_group(tensors, touches[:1], 2), ScoreContext(tensors))
    with pytest.raises(CriterionError, match="no axes at all"):
        Magnitude()(make_group(tensors, [], 2), ScoreContext(tensors))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.randoms(use_true_random=False), st.sampled_from(["none", "mean", "max", "gaussian", "lamp"]),
    st.sampled_from([1.0, 2.0]), st.integers(0, 99),
)  # fmt: skip
def test_follows_permutations_of_the_units(units, random, normalizer, p, seed):
    weight = torch.randn(units, 3, generator=torch.Generator().manual_seed(seed))
    permutation = list(range(units))
    random.shuffle(permutation)

    def scores(tensor: torch.Tensor) -> np.ndarray:
        member = Member(Axis("w", 0, units, "weight", "out"), np.arange(units), np.arange(units))
        group = Group(0, "g", np.arange(units), (member,))
        return Magnitude(p, normalizer=normalizer)(group, ScoreContext({"w": tensor})).numpy()

    np.testing.assert_allclose(scores(weight[permutation]), scores(weight)[permutation], rtol=1e-5, atol=1e-7)


def test_lamp_is_the_normalised_magnitude(group):
    assert lamp() == Magnitude(normalizer="lamp")
    assert Magnitude(normalizer="lamp")(group, ScoreContext(small_network())).max().item() == 1.0


@pytest.mark.parametrize("p", [0, -1.0, float("inf"), float("nan"), "2", True, None])
def test_bad_p(p):
    with pytest.raises(InputError, match="above 0"):
        Magnitude(p=p)


def test_bad_names():
    with pytest.raises(InputError, match="unknown reduction 'median'"):
        Magnitude(reduction="median")
    with pytest.raises(InputError, match="unknown normalizer 'softmax'"):
        Magnitude(normalizer="softmax")
