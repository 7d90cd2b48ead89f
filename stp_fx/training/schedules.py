"""Schedules: the fraction of the original that is removed after step t of N, for a target ratio.

Geometric, linear and one-shot: report, section 1.2.1. Cubic: Zhu and Gupta, "To prune, or not to prune: exploring the
efficacy of pruning for model compression", arXiv 1710.01878, equation 1, from an initial sparsity of zero.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import TypeVar, cast

from stp_fx.checks import check_whole, is_number, is_whole, shown
from stp_fx.errors import InputError, translated
from stp_fx.registry import Registry
from stp_fx.views import chart

__all__ = ["Cubic", "Custom", "Geometric", "Linear", "OneShot", "Schedule", "Then", "known_schedules", "register", "resolve"]

_SLACK = 1e-9
"""How far a schedule may be off by rounding and still count as ending at the ratio, or as not falling."""


_SCHEDULES: Registry[Callable[[], Schedule]] = Registry("schedule")
S = TypeVar("S", bound="Callable[[], Schedule]")


def register(name: str) -> Callable[[S], S]:
    """Lets ``name`` stand for the decorated class, called without arguments.

    Raises:
        InputError: another module has registered the name.
    """
    return _SCHEDULES.register(name)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules: a value that maps (step, steps, ratio) to a cumulative ratio, by :meth:`after`."""

    def after(self, step: int, steps: int, ratio: float) -> float:
        """The fraction of the original that is removed after step ``step`` (1 to ``steps``)."""
        raise NotImplementedError(f"{type(self).__name__} does not override `after`, the fraction removed after a step")

    def __call__(self, step: int, steps: int, ratio: float) -> float:
        """:meth:`after`, with its arguments checked; the last step gives ``ratio`` itself, step 0 nothing.

        Raises:
            InputError: ``ratio`` outside [0, 1), ``steps`` below 1, ``step`` outside 0 to ``steps``, or a schedule that
                gives a number outside 0 to ``ratio``, or does not end at ``ratio``.
        """
        _check(ratio, steps)
        if not is_whole(step) or not 0 <= step <= steps:
            raise InputError(f"the step of a schedule is a whole number from 0 to {steps}; got {shown(step)}")
        if step == 0:
            return 0.0
        value = self.after(step, steps, ratio)
        if not is_number(value) or not -_SLACK <= value <= ratio + _SLACK:
            raise InputError(f"{self!r} gives {value!r} after step {step} of {steps}; a number from 0 to {ratio} is expected")
        if step < steps:
            return min(max(float(value), 0.0), ratio)
        if abs(value - ratio) > _SLACK:
            raise InputError(f"{self!r} ends at {value!r} after all {steps} steps; it must end at the ratio, {ratio}")
        return ratio

    def ratios(self, ratio: float, steps: int) -> tuple[float, ...]:
        """The cumulative ratio after each of ``steps`` steps; never falls, and the last one is ``ratio`` exactly.

        Raises:
            InputError: as for a call, and a schedule that falls: removed channels do not come back.

        Example:
            >>> Linear().ratios(0.5, 4)
            (0.125, 0.25, 0.375, 0.5)
        """
        _check(ratio, steps)
        values = [self(step, steps, ratio) for step in range(1, steps + 1)]
        for step, (before, after) in enumerate(itertools.pairwise(values), 2):
            if after < before - _SLACK:
                raise InputError(f"{self!r} falls from {before} to {after} at step {step} of {steps}; it must not fall")
        return tuple(itertools.accumulate(values, max))

    def plot(self, path: str | pathlib.Path, ratio: float = 0.5, steps: int = 10) -> pathlib.Path:
        """A picture of the cumulative ratio over the steps; the suffix gives the format. Returns the path.

        Raises:
            InputError: matplotlib is not installed, or it does not know the suffix.
        """
        values = (0.0, *self.ratios(ratio, steps))
        with chart(path, 5.0, 3.2) as axes:
            axes.step(range(steps + 1), values, where="post", marker="o")
            axes.set(title=repr(self), xlabel="pruning step", ylabel="fraction removed", ylim=(0.0, max(ratio, 0.01) * 1.05))
        return pathlib.Path(path)


@register("geometric")
@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """Each step keeps the same fraction of the remaining channels: r^(t/N) is kept, with r = 1 - ratio.

    >>> [round(x, 4) for x in Geometric().ratios(0.75, 2)]
    [0.5, 0.75]
    """

    def after(self, step: int, steps: int, ratio: float) -> float:
        return -math.expm1(math.log1p(-ratio) * step / steps)


@register("linear")
@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """Each step removes the same number: ratio * t / N."""

    def after(self, step: int, steps: int, ratio: float) -> float:
        return ratio * step / steps


@register("one_shot")
@dataclasses.dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at the first step; the others remove nothing."""

    def after(self, step: int, steps: int, ratio: float) -> float:
        return ratio


@register("cubic")
@dataclasses.dataclass(frozen=True)
class Cubic(Schedule):
    """Much at first, little at last: ratio * (1 - (1 - t/N)^3), gradual magnitude pruning's schedule."""

    def after(self, step: int, steps: int, ratio: float) -> float:
        return ratio * (1.0 - (1.0 - step / steps) ** 3)


@dataclasses.dataclass(frozen=True, repr=False)
class Custom(Schedule):
    """A callable ``(step, steps, ratio) -> cumulative ratio`` as a schedule."""

    function: Callable[[int, int, float], float]

    def __repr__(self) -> str:
        return f"Custom({getattr(self.function, '__qualname__', type(self.function).__name__)})"

    def __post_init__(self) -> None:
        if isinstance(self.function, type) or not callable(self.function):
            raise InputError(f"a schedule is a callable (step, steps, ratio) -> ratio; got {shown(self.function)}")

    def after(self, step: int, steps: int, ratio: float) -> float:
        def failed(said: str) -> str:
            return (
                f"{self!r} failed at step {step} of {steps} with {said}; a schedule is a callable (step, steps, ratio) -> ratio"
            )

        with translated(InputError, failed):
            return self.function(step, steps, ratio)


@dataclasses.dataclass(frozen=True)
class Then(Schedule):
    """One schedule after another, which may be compositions themselves.

    ``first`` has the first ``at`` of the steps (a fraction in (0, 1), rounded, at least one step each where there are two)
    and removes ``share`` of the ratio (default: ``at``); ``second`` prunes the rest, down to the ratio. With a
    single step, ``second`` takes it.

    >>> Then(OneShot(), Linear(), at=0.5, share=0.5).ratios(0.5, 4)
    (0.25, 0.25, 0.375, 0.5)
    """

    first: str | Schedule | Callable[[int, int, float], float]
    second: str | Schedule | Callable[[int, int, float], float]
    at: float = 0.5
    share: float | None = None

    def __post_init__(self) -> None:
        for schedule in (self.first, self.second):
            resolve(schedule)
        if not is_number(self.at) or not 0.0 < self.at < 1.0:
            raise InputError(f"`at` is the fraction of the steps that the first schedule has, in (0, 1); got {shown(self.at)}")
        if self.share is not None and (not is_number(self.share) or not 0.0 <= self.share <= 1.0):
            raise InputError(
                f"`share` is the fraction of the ratio that the first schedule takes, in [0, 1]; got {shown(self.share)}"
            )

    def after(self, step: int, steps: int, ratio: float) -> float:
        early = min(max(round(self.at * steps), 1), steps - 1)
        middle = ratio * (self.at if self.share is None else self.share)
        if step <= early:
            return resolve(self.first)(step, early, middle)
        left = 1.0 - middle
        return middle + left * resolve(self.second)(step - early, steps - early, (ratio - middle) / left)


def known_schedules() -> tuple[str, ...]:
    """Names that :func:`resolve` knows, sorted."""
    return _SCHEDULES.names()


def resolve(schedule: str | Schedule | Callable[[int, int, float], float]) -> Schedule:
    """The schedule of that name, the given one, or a callable ``(step, steps, ratio) -> float`` as one.

    Raises:
        InputError: an unknown name, a class in place of a value, or something that cannot be called.

    >>> resolve("cubic")
    Cubic()
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str):
        return _SCHEDULES.get(schedule, "A callable (step, steps, ratio) -> ratio works as well")()
    if isinstance(schedule, type) and issubclass(schedule, Schedule):
        raise InputError(f"schedule {schedule.__name__} is a class; pass a value of it: {schedule.__name__}()")
    return Custom(cast("Callable[[int, int, float], float]", schedule))


def _check(ratio: float, steps: int) -> None:
    if not is_number(ratio) or not 0.0 <= ratio < 1.0:
        raise InputError(f"the ratio of a schedule is the fraction that is removed, in [0, 1); got {shown(ratio)}")
    check_whole("steps", steps, 1)
