"""A few steps of an optimizer on the parameters of one block, towards the values that it should give."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from stp_fx.checks import check_seed, check_whole, is_choice, is_number, shown
from stp_fx.errors import InputError
from stp_fx.measure.distributed import several_processes, summed

__all__ = ["Goal", "Parameters", "Training", "exact", "in_random_order", "root_mean_square"]

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""The outputs of a block, and the desired ones, for each of its targets."""

_WARM_UP = 0.1
"""The part of the steps in which the learning rate rises."""
_SMALLEST = 1e-3
_HALF = frozenset({torch.float16, torch.bfloat16})


@dataclasses.dataclass(frozen=True)
class Training:
    """``steps`` of Adam; ``rate``: the learning rate at its highest, relative to the root mean square of a layer's weight."""

    steps: int
    rate: float
    seed: int = 0

    def check(self, start: object, memory: object) -> None:
        """Refuses arguments of a repair by training that are out of range.

        Raises:
            InputError: names the argument.
        """
        check_whole("steps", self.steps, 1)
        check_seed(self.seed)
        if not is_number(self.rate) or not 0 < self.rate < math.inf:
            raise InputError(f"`rate` is a learning rate relative to the weights, above 0 (such as 0.01); got {shown(self.rate)}")
        if start is not None and not is_choice(start, ("sequential",)):
            raise InputError(f"`start` is the repair before the training, 'sequential' or None; got {shown(start)}")
        if memory is not None:
            check_whole("memory", memory, 0)

    def rate_at(self, step: int) -> float:
        """The learning rate: it rises over a tenth of the steps, then falls to zero as a cosine does."""
        rising = (step + 1) / max(1.0, _WARM_UP * self.steps)
        return self.rate * min(rising, 0.5 * (1 + math.cos(math.pi * step / self.steps)))


class Parameters:
    """Parameters in training, on which gradients fall until they are closed. The optimizer works on copies of them, in single
    precision where a network is in half precision (Micikevicius et al., arXiv 1710.03740).

    ``scales``: the root mean square of each one's layer, which the learning rate is relative to (Adafactor, arXiv 1804.04235).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], scales: Sequence[float]) -> None:
        self._own, self._scales = parameters, scales
        self._copies = [exact(p.detach()).clone() for p in parameters]
        self._optimizer = torch.optim.Adam([{"params": [copy], "lr": 0.0} for copy in self._copies])
        self.in_half_precision: bool = any(p.dtype in _HALF for p in parameters)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def step(self, rate: float, scale: float) -> None:
        """One step along the gradients of the parameters, which are ``scale`` times too large, and are taken away. Where they
        are not finite, none."""
        gradients = [None if p.grad is None else exact(p.grad) / scale for p in self._own]
        for parameter in self._own:
            parameter.grad = None
        known = [g for g in gradients if g is not None]
        if several_processes():
            ranks = summed(1, known)
            known = [g.div_(ranks) for g in known]
        if not all(bool(torch.isfinite(g).all()) for g in known):
            return
        each = zip(self._optimizer.param_groups, self._copies, gradients, self._scales, strict=True)
        for group, copy, gradient, own in each:
            group["lr"], copy.grad = rate * own, gradient
        self._optimizer.step()
        self.take(self._copies)

    def numbers(self) -> list[torch.Tensor]:
        """Copies of what they are now."""
        return [copy.clone() for copy in self._copies]

    def take(self, numbers: Sequence[torch.Tensor]) -> None:
        """Gives the parameters these numbers."""
        with torch.no_grad():
            for parameter, number in zip(self._own, numbers, strict=True):
                parameter.copy_(number)

    def close(self) -> None:
        """They need no gradient any more."""
        for parameter in self._own:
            parameter.requires_grad_(False)
            parameter.grad = None


class Goal:
    """The mean of the squared errors of ``targets`` values, each relative to the variance of what it should be; over all
    processes, which exchange sums on ``device``."""

    def __init__(self, targets: int, device: torch.device) -> None:
        self._targets, self._device = targets, device
        self._moments = [[0.0, 0.0, 0.0] for _ in range(targets)]

    def add(self, wanted: Sequence[torch.Tensor]) -> None:
        """The targets of one batch, of which the variances are taken."""
        values = [exact(value) for value in wanted]
        found = [[float(v.numel()), float(v.sum()), float(v.square().sum())] for v in values]
        self._moments = _added(self._moments, found)

    @functools.cached_property
    def variances(self) -> list[float]:
        """Of all batches that have been added before."""
        found = []
        for count, total, square in self._over_processes(self._moments):
            mean = square / max(count, 1.0)
            found.append(max(mean - (total / max(count, 1.0)) ** 2, 1e-12 * mean, 1e-30))
        return found

    def loss(self, pairs: Pairs) -> torch.Tensor:
        """The error for one batch, to be differentiated."""
        each = [
            (exact(given) - exact(wanted)).square().mean() / variance
            for (given, wanted), variance in zip(pairs, self.variances, strict=True)
            if wanted.numel()
        ]
        return torch.stack(each).mean()

    def error(self, batches: Iterable[Pairs]) -> float:
        """The error over several batches."""
        sums = [[0.0, 0.0] for _ in range(self._targets)]
        for pairs in batches:
            found = [[float((exact(g) - exact(w)).square().sum()), float(w.numel())] for g, w in pairs]
            sums = _added(sums, found)
        each = [s / max(n, 1.0) / v for (s, n), v in zip(self._over_processes(sums), self.variances, strict=True)]
        return sum(each) / len(each)

    def _over_processes(self, sums: list[list[float]]) -> list[list[float]]:
        if not several_processes():
            return sums
        tensor = torch.tensor(sums, dtype=torch.float64, device=self._device)
        summed(0, [tensor])
        return tensor.tolist()


def exact(value: torch.Tensor) -> torch.Tensor:
    """In single precision at least."""
    return value.float() if value.dtype in _HALF else value


def root_mean_square(tensor: torch.Tensor) -> float:
    """Of a parameter's numbers; at least a thousandth, as in Adafactor."""
    return max(float(exact(tensor.detach()).square().mean().sqrt()), _SMALLEST) if tensor.numel() else _SMALLEST


def _added(sums: list[list[float]], found: list[list[float]]) -> list[list[float]]:
    return [[a + b for a, b in zip(*each, strict=True)] for each in zip(sums, found, strict=True)]


def in_random_order(numbers: Sequence[int], seed: int) -> Iterator[int]:
    """The numbers again and again, each time in another order; no generator of torch's own is touched."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for k in torch.randperm(len(numbers), generator=generator).tolist():
            yield numbers[k]
