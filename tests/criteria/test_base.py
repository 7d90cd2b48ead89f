from __future__ import annotations

import pytest
import torch

from stp_fx.criteria import (
    Criterion,
    Magnitude,
    Random,
    ScoreContext,
    as_criterion,
    known_criteria,
    register,
    resolve,
    score_groups,
)
from stp_fx.errors import CriterionError, InputError


@pytest.fixture
def tensors():
    return {"w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(4), "n": torch.arange(4)}


@pytest.fixture
def group(make_group, identity, tensors):
    return make_group(tensors, [("w", 0, "weight", identity(4)), ("b", 0, "bias", identity(4))], units=4, index=7)


def test_resolve():
    assert resolve("magnitude") == Magnitude()
    assert resolve("random") == Random()
    assert resolve("lamp") == Magnitude(normalizer="lamp")
    given = Magnitude(p=1.0)
    assert resolve(given) is given
    assert isinstance(given, Criterion)


@pytest.mark.parametrize("name", ["snip", "macaware", ""])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(InputError, match="known names: auto, bn_scale, fpgm, hessian, lamp, mac_aware, magnitude"):
        resolve(name)


@pytest.mark.parametrize("bad", [None, 3, Magnitude, object()])
def test_what_is_not_a_criterion(bad):
    with pytest.raises(InputError, match=r"instance|callable"):
        resolve(bad)


def test_names_are_registered_once():
    assert known_criteria() == (
        "auto", "bn_scale", "fpgm", "hessian", "lamp", "mac_aware", "magnitude", "random", "reconstruction", "taylor", "variance",
    )  # fmt: skip
    register("magnitude")(Magnitude)  # a notebook's cell that is run again

    def stranger() -> Magnitude:
        return Magnitude()

    with pytest.raises(InputError, match=r"criterion 'magnitude' is already registered by"):
        register("magnitude")(stranger)


def test_plain_functions_score(group, tensors):
    criterion = as_criterion(lambda group, context: context.tensors["w"][:, 0].float())
    (scores,) = score_groups([group], criterion, ScoreContext(tensors))
    assert scores.dtype == torch.float64
    assert scores.tolist() == [0.0, 3.0, 6.0, 9.0]


def test_gradients_do_not_leak(group, tensors):
    tensors["w"].requires_grad_(True)
    for criterion in (Magnitude(), lambda group, context: context.tensors["w"].sum(1)):
        (scores,) = score_groups([group], criterion, ScoreContext(tensors))
        assert not scores.requires_grad
        assert scores.shape == (4,)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), [0.0] * 4, None],
    ids=["length", "shape", "dtype", "list", "none"],
)
def test_scores_of_the_wrong_kind(group, tensors, bad):
    with pytest.raises(CriterionError, match=r"shape \(4,\) for group 'group7'"):
        score_groups([group], lambda group, context: bad, ScoreContext(tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(group, tensors, bad):
    tensors["w"][2, 1] = bad
    with pytest.raises(CriterionError, match=r"1 of 4 scores of group 'group7'.*not finite: 'w'") as error:
        score_groups([group], Magnitude(), ScoreContext(tensors))
    assert "'b'" not in str(error.value)


def test_overflow_of_the_criterion_itself(group, tensors):
    with pytest.raises(CriterionError, match="the criterion itself overflowed"):
        score_groups([group], lambda group, context: torch.full((4,), float("inf")), ScoreContext(tensors))


@pytest.mark.parametrize("criterion", [Magnitude(), Random()])
def test_integer_meta_and_missing_weights(make_group, identity, tensors, criterion):
    group = make_group(tensors, [("n", 0, "weight", identity(4))], units=4)
    with pytest.raises(CriterionError, match=r"'n' \(group 'group0'\) has dtype torch.int64"):
        score_groups([group], criterion, ScoreContext(tensors))
    on_meta = ScoreContext({"n": torch.empty(4, device="meta")})
    if isinstance(criterion, Random):  # it reads no weights
        assert torch.equal(score_groups([group], criterion, on_meta)[0], score_groups([group], criterion, on_meta)[0])
    else:
        with pytest.raises(CriterionError, match="meta device"):
            score_groups([group], criterion, on_meta)
    with pytest.raises(CriterionError, match="no tensor 'n'"):
        score_groups([group], criterion, ScoreContext({}))


def test_integer_fallback_parameters_are_named(make_group, identity, tensors):
    group = make_group(tensors, [("n", 0, "other", identity(4))], units=4)
    with pytest.raises(CriterionError, match="'n' has dtype"):
        score_groups([group], Magnitude(), ScoreContext(tensors))


def test_cache_computes_once():
    context = ScoreContext({})
    calls = []
    assert [context.cached("key", lambda: calls.append(1) or 5) for _ in range(3)] == [5, 5, 5]
    assert calls == [1]


def test_no_groups(tensors):
    assert score_groups([], Magnitude(), ScoreContext(tensors)) == []
