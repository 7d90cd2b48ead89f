"""Observations of a regression, as second moments or as they are, and the system that follows from them."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable

import torch

from stp_fx.measure.distributed import gathered, group_device, rank_zeros, summed

__all__ = ["WIDEST", "Half", "Observations", "Products", "System"]

_BLOCK = 256
"""Columns at a time in a product with itself, of which only one triangle is worked out."""
WIDEST = 6144
"""Inputs up to which their second moments are kept, 300 MB in float64; for more, as many observations are. Of fewer observations
than inputs the observations are kept as well: the system is then as large as they are many."""

System = Callable[[float], "torch.Tensor | None"]
"""The change [groups, out, in] for a ridge; None where the system cannot be solved."""


class Half(abc.ABC):
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

    def finished(self) -> Half:
        """After the last observation."""
        return self

    def observations(self) -> Half:
        """After the last observation, of which there are fewer than inputs."""
        return self

    @abc.abstractmethod
    def reduce(self) -> None:
        """Merges over all processes of the default group."""

    @abc.abstractmethod
    def merged(self, other: Half) -> Half:
        """These observations and others."""

    @abc.abstractmethod
    def mixed(self, mix: torch.Tensor) -> Half:
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


class Products(Half):
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

    def finished(self) -> Half:
        self._multiply()
        return self

    def observations(self) -> Half:
        result = Observations()
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
            mean_x, mean_r = _mean(x), _mean(r)
            x, r = x - mean_x[:, None].to(x.dtype), r - mean_r[:, None].to(r.dtype)
            self._merge(x.shape[1], mean_x, mean_r, _square(x), r.mT @ x)

    def _merge(self, n: int, mean_x: torch.Tensor, mean_r: torch.Tensor, xx: torch.Tensor, rx: torch.Tensor) -> None:
        if not self.count:
            self.count, self.mean_x, self.mean_r = n, mean_x, mean_r
            self.xx, self.rx = (each.to(torch.float64, copy=True) for each in (xx, rx))
            return
        total = self.count + n
        dx, dr = mean_x - self.mean_x, mean_r - self.mean_r
        weight = self.count * n / total
        self.xx.add_(xx).baddbmm_(dx[:, :, None], dx[:, None, :], alpha=weight)
        self.rx.add_(rx).baddbmm_(dr[:, :, None], dx[:, None, :], alpha=weight)
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
        self.xx, self.rx = xx, rx
        self.xx, self.rx = self._about_zero(-self.count)  # about the means again

    def _nothing(self, inputs: torch.Size, outputs: torch.Size) -> None:
        """No observations, of inputs [groups, in] and outputs [groups, out]."""
        self.mean_x, self.mean_r = (torch.zeros(each, dtype=torch.float64, device=group_device()) for each in (inputs, outputs))
        self.xx = self.mean_x.new_zeros(*inputs, inputs[-1])
        self.rx = self.mean_x.new_zeros(*outputs, inputs[-1])

    def merged(self, other: Half) -> Half:
        assert isinstance(other, Products)
        result = Products()
        for each in (self, other):
            if each.count:
                result._merge(each.count, each.mean_x, each.mean_r, each.xx, each.rx)
        return result

    def mixed(self, mix: torch.Tensor) -> Half:
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

    def _about_zero(self, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.count if count is None else count
        x = self.mean_x[:, None, :]
        return self.xx.baddbmm(x.mT, x, alpha=count), self.rx.baddbmm(self.mean_r[:, :, None], x, alpha=count)


class Observations(Half):
    """The observations themselves, where there are fewer than inputs, or more inputs than second moments are kept of; the dual
    problem is solved."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.empty(0)
        self.r = torch.empty(0)

    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        room = WIDEST // 2 - self.count
        if room > 0:
            x, r = x[:, :room], r[:, :room]
            self._set(x if not self.count else torch.cat([self.x, x], 1), r if not self.count else torch.cat([self.r, r], 1))

    def _set(self, x: torch.Tensor, r: torch.Tensor) -> None:
        self.x, self.r, self.count = x, r, x.shape[1]
        self.mean_x, self.mean_r = _mean(x), _mean(r)

    def reduce(self) -> None:
        self._set(rank_zeros(self.x), rank_zeros(self.r))  # every process ends with the fit of rank 0's observations

    def merged(self, other: Half) -> Half:
        assert isinstance(other, Observations)
        result, given = Observations(), [each for each in (self, other) if each.count]
        result._set(torch.cat([each.x for each in given], 1), torch.cat([each.r for each in given], 1))
        return result

    def mixed(self, mix: torch.Tensor) -> Half:
        result = Observations()
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
            kind = x.dtype if x.shape[2] > WIDEST else torch.float64
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


def _mean(x: torch.Tensor) -> torch.Tensor:
    """[groups, in], float64; as a product with ones, since a sum over rows in another dtype takes over ten times as long."""
    return (x.new_ones(len(x), 1, x.shape[1]) @ x)[:, 0].double() / x.shape[1]


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
