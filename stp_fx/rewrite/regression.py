"""Ridge regression of what an output lacks on what its layer reads, with the ridge chosen on observations held out."""

from __future__ import annotations

import dataclasses
import math

import torch

from stp_fx.measure.distributed import several_processes, summed
from stp_fx.rewrite.halves import WIDEST, Half, Observations, Products, System

__all__ = ["Fit", "Regression"]

_RIDGES = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the variance of each input. From the middle one the search goes downhill: a factorisation each."""
_ROWS, _PER_INPUT = 1 << 15, 32
"""Observations of a layer: so many, or so many for each of its inputs if that is more."""
_WITHOUT_CHECK = 1e-1
"""The ridge where there is a single observation, and none to hold out."""
_TRIED = 64
"""Outputs for which ridges are tried; of more, so many sums with random signs, whose squares add up to the same on average."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """``change`` of the weight [groups, out, in], and the ``shift`` of the bias [groups, out], None without intercept."""

    change: torch.Tensor
    shift: torch.Tensor | None


class Regression:
    """Residuals ``r`` [groups, n, out] on inputs ``x`` [groups, n, in], shrunk towards no change.

    ``change = Cov(r, x) (Cov(x) + ridge D)^-1`` with D the variances of the inputs: the weight nearest to the present one that
    takes up the residuals (ridge regression, Hoerl and Kennard 1970). Without ``intercept``, moments about zero.
    """

    def __init__(self, inputs: int, intercept: bool) -> None:
        self._intercept = intercept
        self.wanted: int = max(_ROWS, _PER_INPUT * inputs) if inputs <= WIDEST else WIDEST
        """How many observations are enough."""
        self._inputs = inputs
        kind = Products if inputs <= WIDEST else Observations
        self._halves: tuple[Half, Half] = (kind(), kind())
        self.count: int = 0
        self._square: float = 0.0
        self._output: float = 0.0
        self.unlike: int = 0
        """Batches that could not be observed."""

    def add(self, x: torch.Tensor, r: torch.Tensor, output: float) -> None:
        """Observations of one batch; their first half is fitted while the ridge is chosen, the other is held out. ``output``:
        the mean square of what the layer gives, summed over its channels."""
        n = x.shape[1]
        cut = (n + 1) // 2 if self.count else n // 2
        self.count += n
        self._square += float(torch.linalg.vector_norm(r)) ** 2
        self._output += output * n
        for half, part in zip(self._halves, (slice(None, cut), slice(cut, None)), strict=True):
            if x[:, part].shape[1]:
                half.add(x[:, part], r[:, part])

    def reduce(self) -> None:
        """Merges over all processes of the default group; after the last batch."""
        few = self.count < self._inputs and not several_processes()
        self._halves = tuple(half.observations() if few else half.finished() for half in self._halves)  # type: ignore[assignment]
        if several_processes():
            sums = torch.tensor(
                [self._square, self._output, self.unlike], dtype=torch.float64, device=self._halves[0].mean_x.device
            )
            self.count = summed(self.count, [sums])
            self._square, self._output, unlike = sums.tolist()
            self.unlike = int(unlike)
            if unlike:
                return
            for half in self._halves:
                half.reduce()

    @property
    def lacking(self) -> float:
        """The square of the residuals, as a part of that of the outputs."""
        return self._square / max(self._output, 1e-300)

    def fit(self) -> Fit | None:
        """The change; None where no system can be solved, or the residuals held out would only grow."""
        first, second = self._halves
        both = first.merged(second)
        scale = both.scale(self._intercept)
        ridge = _WITHOUT_CHECK
        if first.count and second.count:
            first, second = (_mixed(half) for half in (first, second))
            self._halves = first, second  # the whole ones are large, and in both
            found = _chosen(first.system(scale, self._intercept), second, self._intercept)
            if found is None:
                return self._mean_alone(both)
            ridge = found
        change = both.system(scale, self._intercept)(ridge)
        if change is None:
            return self._mean_alone(both)
        return Fit(change, both.shift(change) if self._intercept else None)

    def _mean_alone(self, both: Half) -> Fit | None:
        if not self._intercept:
            return None
        change = torch.zeros(both.groups, both.outputs, both.inputs, dtype=torch.float64, device=both.mean_x.device)
        return Fit(change, both.shift(change))


def _mixed(half: Half) -> Half:
    """The same observations of few outputs."""
    if half.outputs <= 2 * _TRIED:
        return half
    signs = torch.randint(0, 2, (_TRIED, half.outputs), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return half.mixed((signs / _TRIED**0.5).to(half.mean_r))


def _chosen(system: System, held_out: Half, centred: bool) -> float | None:
    """The ridge whose change lowers the residuals held out most, found downhill; None if none lowers them."""
    losses: dict[int, float] = {}

    def loss(k: int) -> float:
        if k not in losses:
            change = system(_RIDGES[k]) if 0 <= k < len(_RIDGES) else None
            found = math.inf if change is None else held_out.loss(change, centred)
            losses[k] = found if math.isfinite(found) else math.inf
        return losses[k]

    at = len(_RIDGES) // 2
    while True:
        best = min((at, at + 1, at - 1), key=loss)
        if best == at and (math.isfinite(loss(at)) or at == len(_RIDGES) - 1):
            return _RIDGES[at] if loss(at) < 0 else None
        at = best if best != at else at + 1  # where none can be solved, a stronger one can
