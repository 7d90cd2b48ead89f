"""Count, mean, variance and covariance of channels, merged over batches and processes in float64.

Merging: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

import dataclasses

import torch

from stp_fx.measure.distributed import gathered, summed

__all__ = ["Moments", "RunningMap", "RunningMoments"]

_CANCELLATION = 1e3
"""Where a squared mean is so many times the variance, a variance from float32 sums has lost its digits: it is redone."""
_ROWS = 512
"""Observations summed in float32 before they are added in float64."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """``count`` observations; ``mean`` and population ``variance`` (float64 [channels]); ``covariance`` (float64
    [channels, channels], population, centred) where it was asked for."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    covariance: torch.Tensor | None = None


class RunningMoments:
    """Takes batches of one value; every position outside ``dim`` is an observation."""

    def __init__(self, dim: int, covariance: bool = False) -> None:
        self.dim = dim
        self.with_covariance = covariance
        self.count: int = 0
        self.mean: torch.Tensor | None = None
        self.square: torch.Tensor | None = None  # sums of squared deviations, or of their outer products

    def add(self, value: torch.Tensor) -> bool:
        """Merges one batch; False if it is not finite, and then nothing is merged."""
        value = value.detach()
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        count = value.numel() // max(value.shape[self.dim], 1)
        if count == 0:
            return True
        with torch.autocast(value.device.type, enabled=False):
            mean, square = _outer_moments(value, self.dim) if self.with_covariance else _plain_moments(value, self.dim)
        if not bool(torch.isfinite(mean).all() and torch.isfinite(square).all()):
            return False
        self._merge(count, mean, square)
        return True

    def _merge(self, count: int, mean: torch.Tensor, square: torch.Tensor) -> None:
        if self.mean is None or self.square is None:
            self.count, self.mean, self.square = count, mean, square
            return
        total = self.count + count
        delta = mean - self.mean
        weight = self.count * count / total
        self.square += square + (torch.outer(delta, delta) if self.with_covariance else delta * delta) * weight
        self.mean += delta * (count / total)
        self.count = total

    def reduce(self) -> None:
        """Merges over all processes of the default group: every rank ends with the moments of all batches."""
        assert self.mean is not None
        assert self.square is not None
        weighted = self.mean * self.count
        total = summed(self.count, [weighted])
        mean = weighted / total
        delta = self.mean - mean
        square = self.square + (torch.outer(delta, delta) if self.with_covariance else delta * delta) * self.count
        summed(0, [square])
        self.count, self.mean, self.square = total, mean, square

    def result(self) -> Moments:
        assert self.mean is not None
        assert self.square is not None
        spread = (self.square / self.count).cpu()
        covariance = spread if self.with_covariance else None
        variance = (spread.diagonal().clone() if self.with_covariance else spread).clamp_min(0.0)
        return Moments(self.count, self.mean.cpu(), variance, covariance)


class RunningMap:
    """The mean over dimension 0, position by position: float64 [1, *rest]; ``None`` once batches differ in shape."""

    def __init__(self) -> None:
        self.count: int = 0
        self.total: torch.Tensor | None = None
        self.uneven: bool = False

    def add(self, value: torch.Tensor) -> None:
        if self.total is not None and self.total.shape != value.shape[1:]:
            self.uneven = True
        if self.uneven:
            return
        value = value.detach()
        summed = value.sum(0, dtype=torch.float64)
        self.total = summed if self.total is None else self.total + summed
        self.count += value.shape[0]

    def reduce(self) -> None:
        """Merges over all processes of the default group. There is no map if one of them, or two together, saw several shapes."""
        assert self.total is not None
        shapes = {None if uneven else shape for uneven, shape in gathered((self.uneven, self.total.shape))}
        self.uneven = len(shapes) > 1 or None in shapes
        if not self.uneven:
            self.count = summed(self.count, [self.total])

    def result(self) -> torch.Tensor | None:
        return None if self.total is None or self.uneven else (self.total / self.count)[None].cpu()


def _plain_moments(value: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations of one batch: float64 [channels] each."""
    count = value.numel() // value.shape[dim]
    if value.dtype == torch.float64:
        flat = value.movedim(dim, 0).reshape(value.shape[dim], -1)
        mean = flat.mean(1)
        return mean, (flat - mean[:, None]).square_().sum(1)
    total, squares = _column_sums(value.movedim(dim, -1)) if _is_last(value, dim) else _row_sums(value, dim)
    mean = total / count
    square = squares - total * mean
    bad = torch.nonzero(~(squares <= _CANCELLATION * square)).ravel()
    if len(bad):
        exact = value.index_select(dim, bad).movedim(dim, 0).reshape(len(bad), -1).double()
        mean[bad] = exact.mean(1)
        square[bad] = (exact - mean[bad][:, None]).square_().sum(1)
    return mean, square


def _is_last(value: torch.Tensor, dim: int) -> bool:
    """Whether the channels lie beside each other in memory."""
    return value.stride(dim) == 1 and value.shape[dim] > 1


def _column_sums(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over all but the last dimension, as products with a row of ones: a reduction along columns is ten times slower."""
    flat = rows.reshape(-1, rows.shape[-1])
    ones = torch.ones(1, _ROWS, dtype=flat.dtype, device=flat.device)
    total = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
    squares = torch.zeros_like(total)
    for block in flat.split(_ROWS):
        lead = ones[:, : len(block)]
        total += (lead @ block)[0]
        squares += (lead @ block.square())[0]
    return total, squares


def _row_sums(value: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the dimensions after ``dim`` in float32, over those before it in float64."""
    shape = value.shape
    flat = value.reshape(*shape[: dim + 1], -1)
    before = tuple(range(dim))
    total, norm = flat.sum(-1).double(), torch.linalg.vector_norm(flat, dim=-1).double()
    squares = norm * norm
    return (total.sum(before), squares.sum(before)) if before else (total, squares)


def _outer_moments(value: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [channels] and sum of outer products of deviations [channels, channels] of one batch, in float64."""
    mean, _ = _plain_moments(value, dim)
    centred = value.movedim(dim, -1).reshape(-1, value.shape[dim]) - mean.to(value.dtype)
    return mean, (centred.T @ centred).double()
