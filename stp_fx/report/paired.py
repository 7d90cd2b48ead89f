"""Latency of two graphs, measured in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch
from torch import fx

from stp_fx.checks import shown
from stp_fx.errors import InputError
from stp_fx.ir.provenance import example_of
from stp_fx.measure.calibration import arguments_of, as_device, device_of, eval_twin
from stp_fx.measure.latency import example_values

__all__ = ["Latency", "paired_latency"]

_BLOCK = 0.05
"""Seconds that one block of calls of the first graph takes at least: well above the clock's and the scheduler's grain."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds a call, one measurement a round, of two graphs on the same input; ``inputs`` names its shapes."""

    before: tuple[float, ...]
    after: tuple[float, ...]
    inputs: tuple[str, ...]
    threads: int
    device: str

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.before), statistics.median(self.after)

    @property
    def left(self) -> float:
        """The time that is left, as a fraction: the median over rounds, so that what slows a whole round cancels."""
        return statistics.median(new / old for old, new in zip(self.before, self.after, strict=True))


def paired_latency(before: fx.GraphModule, after: fx.GraphModule, example: Any = None, *, rounds: int = 9) -> Latency:
    """Times both graphs with ``torch.utils.benchmark``, a block of calls of each in every round, the graph that is first
    alternates.

    In eval mode without gradients, with torch's present number of threads, each on its own device. ``example`` is a tensor or a
    tuple of arguments; by default random numbers of the recorded example's shapes.

    Raises:
        InputError: fewer than one round, or an example that the graphs do not run on.
    """
    # Not at the top: the module looks for compilers and CUDA as it is imported, and warns on some machines.
    from torch.utils.benchmark import Timer

    if rounds < 1:
        raise InputError(f"latency needs at least one round; got {shown(rounds)}")
    calls = [_Call(gm, example) for gm in (before, after)]
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for call in calls:
            call.checked()
        number = max(1, min(10_000, round(_BLOCK / max(timers[0].timeit(1).median, 1e-9))))
        for turn in range(rounds):
            for k in (0, 1) if turn % 2 == 0 else (1, 0):
                seconds[k].append(timers[k].timeit(number).median)
    shapes = tuple(_shape(value) for value in calls[0].arguments)
    return Latency(tuple(seconds[0]), tuple(seconds[1]), shapes, torch.get_num_threads(), str(device_of(before)))


class _Call:
    def __init__(self, gm: fx.GraphModule, example: Any) -> None:
        self._gm = eval_twin(gm)
        try:
            values = example_values(gm) if example is None else arguments_of(gm, as_device(example, device_of(gm)))
        except RecursionError:
            raise InputError("latency: the example is nested too deeply, or holds itself: give tensors") from None
        if len(values) != len(example_of(gm)):
            raise InputError(f"latency: the example has {len(values)} values, the graph takes {len(example_of(gm))}")
        self.arguments = values

    def __call__(self) -> None:
        self._gm(*self.arguments)

    def checked(self) -> None:
        try:
            self()
        except Exception as error:
            shapes = ", ".join(map(_shape, self.arguments))
            raise InputError(f"latency: the graph does not run on an input of {shapes}: {error}") from error


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "×".join(map(str, value.shape)) + ("" if value.dtype == torch.float32 else f" {str(value.dtype)[6:]}")
    return type(value).__name__
