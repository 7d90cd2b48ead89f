"""``Validation``: what was run to check a capture and a removal, and ``Budget``: what a check may cost."""

from __future__ import annotations

import dataclasses
import math
import numbers
import time
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from stp_fx.checks import is_choice, shown
from stp_fx.errors import InputError

__all__ = ["Budget", "Validate", "Validation", "together"]

Validate = bool | float | Literal["auto"]
"""True: every check, False: none, a number: checks for that many seconds, "auto": see :class:`Budget`."""

SECONDS = 30.0
"""The time that "auto" spends at most on a capture and a removal together."""
FORWARDS = 8
"""Forward passes of a capture with "auto": model and graph in eval mode, in train mode, with another batch, in another size.
A removal takes two more."""


@dataclasses.dataclass(frozen=True, repr=False)
class Validation:
    """The runs that checked that a graph computes what the model computes, and a smaller graph what the masked one computes.

    Args:
        differences: by the name of a check ("eval", "train", "batch 3", "size 40x40", "masked = removed"), the largest
            difference found, relative to the largest value of the tensor.
        differs: checks that found a difference in what is not guaranteed (the mode that the model was not in), with it.
        left_out: checks that could not be run, or say nothing, and why.
        seconds: what the checks took.
        forwards: forward passes of a model or graph.
        slowest: seconds of the slowest of them.
    """

    differences: Mapping[str, float] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    forwards: int = 0
    slowest: float = 0.0

    @property
    def ran(self) -> list[str]:
        """The checks that were run."""
        return [*self.differences, *self.differs]

    def line(self) -> str:
        """One line: what is checked, what differs, what is not checked and why. The same on every machine."""
        parts = [f"checked: {', '.join(self.differences)}" if self.differences else "unchecked"]
        parts += [f"in {name} mode the graph differs: {text}" for name, text in self.differs.items()]
        parts += [f"not checked: {name} ({reason})" for name, reason in self.left_out.items()]
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        return {**dataclasses.asdict(self), "ran": self.ran}

    def __repr__(self) -> str:
        worst = f"; largest difference {max(self.differences.values()):.1e}" if self.differences else ""
        return f"Validation({self.line()}{worst}; {self.forwards} forwards, {self.seconds:.2f} s)"


def together(first: Validation | None, second: Validation | None) -> Validation | None:
    """Two validations as one."""
    if first is None or second is None:
        return second if first is None else first
    return Validation(
        {**first.differences, **second.differences},
        {**first.differs, **second.differs},
        {**first.left_out, **second.left_out},
        first.seconds + second.seconds,
        first.forwards + second.forwards,
        max(first.slowest, second.slowest),
    )


class Budget:
    """The time and the forward passes that checks may take, and what they have taken.

    "auto" takes at most ten forward passes for a capture and a removal together, and at most 30 seconds. A check is refused when
    the passes that it needs would not fit, judged by the slowest pass so far. A difference that is found costs a few passes more.

    Args:
        spent: what the capture was checked with, where a removal is to be checked.
        forwards: as many passes as "auto" takes here.

    Raises:
        InputError: ``validate`` is none of True, False, "auto" and a positive number of seconds.
    """

    def __init__(self, validate: Validate, spent: Validation | None = None, forwards: int = FORWARDS) -> None:
        number = isinstance(validate, numbers.Real) and not isinstance(validate, bool)
        if not (isinstance(validate, bool) or is_choice(validate, ("auto",)) or (number and 0 < validate < math.inf)):  # type: ignore[operator]
            raise InputError(f"`validate` is True, False, 'auto' or a positive number of seconds; got {shown(validate)}")
        self.off = validate is False
        self._auto = is_choice(validate, ("auto",))
        self.bounded = validate is not True
        self._limit = float(validate) if number else SECONDS if self._auto else math.inf
        if self._auto and spent is not None:
            self._limit -= spent.seconds
        self._most = forwards
        self._start = time.perf_counter()
        self._spent = 0.0
        self.forwards = 0
        self.slowest = 0.0 if spent is None else spent.slowest

    @property
    def seconds(self) -> float:
        """The seconds that the checks have taken since the budget was made, or :meth:`again` was called first."""
        return time.perf_counter() - self._start

    def again(self) -> None:
        """Another graph is checked: forward passes are counted anew, and time goes on, but for that since :meth:`pause`."""
        self.forwards = 0
        self._start = time.perf_counter() - self._spent

    def pause(self) -> None:
        """The checks of a graph are over; what comes before those of another, such as its capture, is not counted."""
        self._spent = self.seconds

    def allow(self, forwards: int) -> None:
        """A difference is looked into: so many forward passes more than otherwise."""
        self._most += forwards

    def count(self, seconds: float) -> None:
        """A forward pass has taken that long."""
        self.forwards += 1
        self.slowest = max(self.slowest, seconds)

    def refuses(self, forwards: int, *, size: float = 1.0, kept: int = 0) -> str | None:
        """Why that many passes more are too many; None if they are not.

        Args:
            size: how much larger than before the input is.
            kept: passes for which time is left: those of the removal.
        """
        if self._auto and self.forwards + forwards > self._most:
            return f"{self._most} forward passes are the most that validate='auto' takes"
        needed = (forwards * size + (kept if self._auto else 0)) * self.slowest
        if self.seconds + needed > self._limit:
            return f"a forward pass takes {self.slowest:.2g} s, and the limit is {max(self._limit, 0):.3g} s"
        return None
