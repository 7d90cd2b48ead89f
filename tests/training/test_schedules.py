"""What every schedule promises, and the formulas of each."""

from __future__ import annotations

import builtins
import doctest
import itertools
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp_fx import schedules
from stp_fx.errors import InputError


def _square(step: int, steps: int, ratio: float) -> float:
    return ratio * (step / steps) ** 2


EVERY = [
    schedules.Geometric(),
    schedules.Linear(),
    schedules.OneShot(),
    schedules.Cubic(),
    schedules.Custom(_square),
    schedules.Then("one_shot", "geometric", at=0.3, share=0.4),
    schedules.Then(schedules.Then("linear", "cubic"), "geometric", at=0.7),
    schedules.Then("cubic", "linear", share=1.0),
    schedules.Then("cubic", "linear", share=0.0),
]
NAMES = ["geometric", "linear", "one_shot", "cubic", "custom", "then", "then_nested", "then_all", "then_nothing"]


@pytest.mark.parametrize("schedule", EVERY, ids=NAMES)
@given(ratio=st.floats(0.0, 0.999), steps=st.integers(1, 40))
def test_contract(schedule: schedules.Schedule, ratio: float, steps: int) -> None:
    values = schedule.ratios(ratio, steps)
    assert len(values) == steps
    assert values[-1] == ratio
    assert all(0.0 <= value <= ratio for value in values)
    assert all(before <= after for before, after in itertools.pairwise(values))
    assert schedule(0, steps, ratio) == 0.0
    assert schedule(steps, steps, ratio) == ratio


@pytest.mark.parametrize("schedule", EVERY, ids=NAMES)
@pytest.mark.parametrize(
    ("ratio", "steps"), [(1.0, 3), (-0.1, 3), (float("nan"), 3), (True, 3), ("0.5", 3), (0.5, 0), (0.5, 2.0), (0.5, True)]
)
def test_bad_arguments_are_named(schedule: schedules.Schedule, ratio: float, steps: int) -> None:
    with pytest.raises(InputError, match=r"ratio|steps"):
        schedule.ratios(ratio, steps)


def test_a_step_out_of_range_is_named() -> None:
    for step in (-1, 4, 1.5):
        with pytest.raises(InputError, match="from 0 to 3"):
            schedules.Linear()(step, 3, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_geometric_keeps_the_same_fraction_every_step(ratio: float) -> None:
    kept = [1.0] + [1.0 - value for value in schedules.Geometric().ratios(ratio, 7)]
    for before, after in itertools.pairwise(kept):
        assert after / before == pytest.approx((1.0 - ratio) ** (1 / 7), rel=1e-12)


def test_formulas() -> None:
    assert schedules.Linear().ratios(0.6, 3) == pytest.approx((0.2, 0.4, 0.6))
    assert schedules.OneShot().ratios(0.6, 3) == (0.6, 0.6, 0.6)
    assert schedules.Cubic().ratios(0.8, 4) == pytest.approx(tuple(0.8 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)))


def test_a_composition_hands_over_where_it_says() -> None:
    both = schedules.Then("cubic", "geometric", at=0.4, share=0.5)
    values = both.ratios(0.8, 10)
    assert values[:4] == pytest.approx(schedules.Cubic().ratios(0.4, 4))
    kept = [1.0 - value for value in values[3:]]
    assert [b / a for a, b in itertools.pairwise(kept)] == pytest.approx([(0.2 / 0.6) ** (1 / 6)] * 6)
    assert schedules.Then("linear", "linear", at=0.5).ratios(0.8, 6) == pytest.approx(schedules.Linear().ratios(0.8, 6))
    assert schedules.Then("linear", "linear").ratios(0.8, 1) == (0.8,)


@pytest.mark.parametrize(
    "arguments", [{"at": 0.0}, {"at": 1.0}, {"at": "half"}, {"share": 1.5}, {"share": -0.1}, {"share": True}], ids=repr
)
def test_bad_compositions_are_named(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        schedules.Then("linear", "cubic", **arguments)
    with pytest.raises(InputError, match="unknown schedule 'lineal'"):
        schedules.Then("lineal", "cubic")


def test_resolve() -> None:
    assert schedules.known_schedules() == ("cubic", "geometric", "linear", "one_shot")
    assert [schedules.resolve(name) for name in schedules.known_schedules()] == EVERY[3:4] + EVERY[:3]
    assert schedules.resolve(EVERY[5]) is EVERY[5]
    assert schedules.resolve(lambda step, steps, ratio: ratio).ratios(0.5, 2) == (0.5, 0.5)


@pytest.mark.parametrize("wrong", ["cosine", schedules.Linear, 3, None], ids=repr)
def test_resolve_says_what_it_knows(wrong: object) -> None:
    with pytest.raises(InputError, match="schedule"):
        schedules.resolve(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda step, steps, ratio: ratio / 2, "must end at the ratio"),
        (lambda step, steps, ratio: 2 * ratio, "from 0 to 0.5"),
        (lambda step, steps, ratio: float("nan"), "from 0 to 0.5"),
        (lambda step, steps, ratio: None, "from 0 to 0.5"),
        (lambda step, steps, ratio: ratio if step in (1, steps) else 0.0, "must not fall"),
    ],
)
def test_a_callable_that_breaks_the_contract_is_named(function: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedules.resolve(function).ratios(0.5, 4)  # type: ignore[arg-type]


def test_plot(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert schedules.Cubic().plot(tmp_path / "cubic.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot plot to"):
        schedules.Cubic().plot(tmp_path / "cubic.nothing")
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install matplotlib"):
        schedules.Cubic().plot(tmp_path / "cubic.png")


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(schedules).failed == 0
