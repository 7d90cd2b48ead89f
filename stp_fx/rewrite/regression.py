"""Ridge regression of what an output lacks on what its layer reads, with the ridge chosen on observations held out."""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from collections.abc import Callable

import torch

from stp_fx.measure.distributed import gathered, group_device, rank_zeros, several_processes, summed

__all__ = ["Fit", "Regression"]

_RIDGES = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the variance of each input. From the middle one the search goes downhill: a factorisation each."""
_ROWS, _PER_INPUT = 1 << 15, 32
"""Observations of a layer: so many, or so many for each of its inputs if that is more."""
_WITHOUT_CHECK = 1e-1
"""The ridge where there is a single observation, and none to hold out."""
_TRIED = 64
"""Outputs for which ridges are tried; of more, so many sums with random signs, whose squares add up to the same on average."""
_BLOCK = 256
"""Columns at a time in a product with itself, of which only one triangle is worked out."""
_WIDEST = 6144
"""Inputs up to which their second moments are kept, 300 MB in float64; for more, as many observations are. Of fewer observations
than inputs the observations are kept as well: the system is then as large as they are many."""


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
        self.wanted: int = max(_ROWS, _PER_INPUT * inputs) if inputs <= _WIDEST else _WIDEST
        """How many observations are enough."""
        self._inputs = inputs
        kind = _Products if inputs <= _WIDEST else _Observations
        self._halves: tuple[_Half, _Half] = (kind(), kind())
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
        self._square += float(r.double().square().sum())
        self._output += output * n
        for half, part in zip(self._halves, (slice(None, cut), slice(cut, None)), strict=True):
            if x[:, part].shape[1]:
                half.add(x[:, part], r[:, part])

    def reduce(self) -> None:
        """Merges over all processes of the default group; after the last batch."""
        few = self.count < self._inputs and not several_processes()
        first, second = (half.observations() if few else half.finished() for half in self._halves)
        self._halves = first, second
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

    def _mean_alone(self, both: _Half) -> Fit | None:
        if not self._intercept:
            return None
        change = torch.zeros(both.groups, both.outputs, both.inputs, dtype=torch.float64, device=both.mean_x.device)
        return Fit(change, both.shift(change))


def _mixed(half: _Half) -> _Half:
    """The same observations of few outputs."""
    if half.outputs <= 2 * _TRIED:
        return half
    signs = torch.randint(0, 2, (_TRIED, half.outputs), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return half.mixed((signs / _TRIED**0.5).to(half.mean_r))


System = Callable[[float], "torch.Tensor | None"]
"""The change [groups, out, in] for a ridge; None where the system cannot be solved."""


def _chosen(system: System, held_out: _Half, centred: bool) -> float | None:
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


class _Half(abc.ABC):
    """Observations with their means, float64 [groups, in] and [groups, out]."""

    def __init__(self) -> None:
        self.count: int = 0
        self.mean_x = torch.empty(0)
        self.mean_r = torch.empty(0)

    @property
    def groups(self) -> int:
        return len(self.mean_x)

    @property
    def inputs(self) -> int:
        return self.mean_x.shape[1]

    @property
    def outputs(self) -> int:
        return self.mean_r.shape[1]

    @abc.abstractmethod
    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        """Observations of one batch."""

    def finished(self) -> _Half:
        """After the last observation."""
        return self

    def observations(self) -> _Half:
        """After the last observation, of which there are fewer than inputs."""
        return self

    @abc.abstractmethod
    def reduce(self) -> None:
        """Merges over all processes of the default group."""

    @abc.abstractmethod
    def merged(self, other: _Half) -> _Half:
        """These observations and others."""

    @abc.abstractmethod
    def mixed(self, mix: torch.Tensor) -> _Half:
        """The same observations of other outputs, which ``mix`` [new, out] makes of these."""

    @abc.abstractmethod
    def scale(self, centred: bool) -> torch.Tensor:
        """One over the standard deviation of each input, 0 for one that is constant."""

    @abc.abstractmethod
    def system(self, scale: torch.Tensor, centred: bool) -> System:
        """The system of equations for inputs times ``scale``."""

    @abc.abstractmethod
    def loss(self, change: torch.Tensor, centred: bool) -> float:
        """By how much a change moves the sum of the residuals' squares."""

    def shift(self, change: torch.Tensor) -> torch.Tensor:
        """The intercept that goes with a change: [groups, out]."""
        return self.mean_r - torch.einsum("goi,gi->go", change, self.mean_x)


class _Products(_Half):
    """Sums of products about the means. Observations wait until there are about as many as inputs, and are multiplied at once."""

    def __init__(self) -> None:
        super().__init__()
        self.xx = torch.empty(0)
        self.rx = torch.empty(0)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        self._waiting.append((x, r))
        if sum(each.shape[1] for each, _ in self._waiting) >= x.shape[2]:
            self._multiply()

    def finished(self) -> _Half:
        self._multiply()
        return self

    def observations(self) -> _Half:
        result = _Observations()
        if self._waiting:
            result._set(*self._together())
        return result

    def _together(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, r = (torch.cat([pair[k] for pair in self._waiting], 1) for k in (0, 1))
        self._waiting = []
        return x, r

    def _multiply(self) -> None:
        if self._waiting:
            x, r = self._together()
            mean_x, mean_r = x.mean(1, dtype=torch.float64), r.mean(1, dtype=torch.float64)
            x, r = x - mean_x[:, None].to(x.dtype), r - mean_r[:, None].to(r.dtype)
            self._merge(x.shape[1], mean_x, mean_r, _square(x).double(), (r.mT @ x).double())

    def _merge(self, n: int, mean_x: torch.Tensor, mean_r: torch.Tensor, xx: torch.Tensor, rx: torch.Tensor) -> None:
        if not self.count:
            self.count, self.mean_x, self.mean_r, self.xx, self.rx = n, mean_x, mean_r, xx, rx
            return
        total = self.count + n
        dx, dr = mean_x - self.mean_x, mean_r - self.mean_r
        weight = self.count * n / total
        self.xx = (self.xx + xx).baddbmm_(dx[:, :, None], dx[:, None, :], alpha=weight)
        self.rx = (self.rx + rx).baddbmm_(dr[:, :, None], dx[:, None, :], alpha=weight)
        self.mean_x, self.mean_r = self.mean_x + dx * (n / total), self.mean_r + dr * (n / total)
        self.count = total

    def reduce(self) -> None:
        known = gathered((self.count, self.mean_x.shape, self.mean_r.shape))
        shapes = next((shapes for count, *shapes in known if count), None)
        if shapes is None:
            return
        if not self.count:  # the small batches of this process have left nothing for this half
            self._nothing(*shapes)
        sums = [self.mean_x * self.count, self.mean_r * self.count]
        xx, rx = self._about_zero()
        self.count = summed(self.count, [*sums, xx, rx])
        self.mean_x, self.mean_r = (s / self.count for s in sums)
        self.xx = xx - _outer(self.mean_x, self.mean_x) * self.count
        self.rx = rx - _outer(self.mean_r, self.mean_x) * self.count

    def _nothing(self, inputs: torch.Size, outputs: torch.Size) -> None:
        """No observations, of inputs [groups, in] and outputs [groups, out]."""
        self.mean_x, self.mean_r = (torch.zeros(each, dtype=torch.float64, device=group_device()) for each in (inputs, outputs))
        self.xx, self.rx = torch.zeros_like(_outer(self.mean_x, self.mean_x)), torch.zeros_like(_outer(self.mean_r, self.mean_x))

    def merged(self, other: _Half) -> _Half:
        assert isinstance(other, _Products)
        result = _Products()
        for each in (self, other):
            if each.count:
                result._merge(each.count, each.mean_x, each.mean_r, each.xx, each.rx)
        return result

    def mixed(self, mix: torch.Tensor) -> _Half:
        result = copy.copy(self)
        result.rx, result.mean_r = mix @ self.rx, self.mean_r @ mix.mT
        return result

    def scale(self, centred: bool) -> torch.Tensor:
        return _inverse_root((self.xx if centred else self._about_zero()[0]).diagonal(dim1=1, dim2=2) / self.count)

    def system(self, scale: torch.Tensor, centred: bool) -> System:
        xx, rx = (self.xx, self.rx) if centred else self._about_zero()
        matrix = (xx * (scale / self.count)[:, :, None]).mul_(scale[:, None, :])
        right = (rx * (scale / self.count)[:, None, :]).mT
        return lambda ridge: _scaled(_solved(matrix, ridge, right), scale)

    def loss(self, change: torch.Tensor, centred: bool) -> float:
        xx, rx = (self.xx, self.rx) if centred else self._about_zero()
        return float(((change @ xx - 2 * rx) * change).sum())

    def _about_zero(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.xx + _outer(self.mean_x, self.mean_x) * self.count,
            self.rx + _outer(self.mean_r, self.mean_x) * self.count,
        )


class _Observations(_Half):
    """The observations themselves, where there are fewer than inputs, or more inputs than second moments are kept of; the dual
    problem is solved."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.empty(0)
        self.r = torch.empty(0)

    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        room = _WIDEST // 2 - self.count
        if room > 0:
            x, r = x[:, :room], r[:, :room]
            self._set(x if not self.count else torch.cat([self.x, x], 1), r if not self.count else torch.cat([self.r, r], 1))

    def _set(self, x: torch.Tensor, r: torch.Tensor) -> None:
        self.x, self.r, self.count = x, r, x.shape[1]
        self.mean_x, self.mean_r = x.mean(1, dtype=torch.float64), r.mean(1, dtype=torch.float64)

    def reduce(self) -> None:
        self._set(rank_zeros(self.x), rank_zeros(self.r))  # every process ends with the fit of rank 0's observations

    def merged(self, other: _Half) -> _Half:
        assert isinstance(other, _Observations)
        result, given = _Observations(), [each for each in (self, other) if each.count]
        result._set(torch.cat([each.x for each in given], 1), torch.cat([each.r for each in given], 1))
        return result

    def mixed(self, mix: torch.Tensor) -> _Half:
        result = _Observations()
        result._set(self.x, self.r @ mix.to(self.r).mT)
        return result

    def scale(self, centred: bool) -> torch.Tensor:
        x = self.x - self.mean_x[:, None].to(self.x.dtype) if centred else self.x
        return _inverse_root(x.square().mean(1, dtype=torch.float64))

    def system(self, scale: torch.Tensor, centred: bool) -> System:
        x, r = self._about(centred)
        x = x * scale[:, None].to(x.dtype)
        matrix = (x @ x.mT).double() / self.count
        right = r.double() / self.count

        def change(ridge: float) -> torch.Tensor | None:
            dual = _solved(matrix, ridge, right)
            kind = x.dtype if x.shape[2] > _WIDEST else torch.float64
            return None if dual is None else _scaled((dual.mT.to(kind) @ x.to(kind)).double().mT, scale)

        return change

    def loss(self, change: torch.Tensor, centred: bool) -> float:
        x, r = self._about(centred)
        gain = x @ change.to(x.dtype).mT
        return float((gain.square() - 2 * gain * r).sum(dtype=torch.float64))

    def _about(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not centred:
            return self.x, self.r
        return self.x - self.mean_x[:, None].to(self.x.dtype), self.r - self.mean_r[:, None].to(self.r.dtype)


def _square(x: torch.Tensor) -> torch.Tensor:
    """``x.mT @ x``, of which the upper triangle is worked out in blocks."""
    width = x.shape[2]
    if width <= 2 * _BLOCK:
        return x.mT @ x
    result = x.new_empty(len(x), width, width)
    for at in range(0, width, _BLOCK):
        part = slice(at, at + _BLOCK)
        result[:, part, at:] = x[:, :, part].mT @ x[:, :, at:]
        result[:, at + _BLOCK :, part] = result[:, part, at + _BLOCK :].mT
    return result


def _outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[:, :, None] * b[:, None, :]


def _inverse_root(variance: torch.Tensor) -> torch.Tensor:
    least = variance.amax(1, keepdim=True) * 1e-12
    return torch.where(variance > least, variance, torch.inf).rsqrt()


def _solved(matrix: torch.Tensor, ridge: float, right: torch.Tensor) -> torch.Tensor | None:
    """``(matrix + ridge) x = right`` for each group; None if one cannot be solved."""
    regular = matrix.clone()
    regular.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, info = torch.linalg.cholesky_ex(regular)
    if bool(info.any()):
        return None
    solved = torch.cholesky_solve(right, factor)
    return solved if bool(torch.isfinite(solved).all()) else None


def _scaled(solved: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | None:
    """The change [groups, out, in] from the solution [groups, in, out] for scaled inputs."""
    return None if solved is None else solved.mT * scale[:, None, :]
