"""Best linear reconstruction of some channels by others, from their covariance."""

from __future__ import annotations

import torch

__all__ = ["reconstruction"]

_GROWTH = 100.0
"""Factor by which the ridge grows when a factorisation fails."""
_LARGEST_RIDGE = 1e-1


def reconstruction(covariance: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """A [removed, kept] such that A x_kept is the best linear estimate of x_removed about their means.

    ``covariance``: centred, float64 [n, n]; ``kept``, ``removed``: positions (int64). The ridge is added to the correlation
    matrix of the kept channels, so that it is relative to each channel's own variance; channels that are constant are
    not used. Returns None where the system is too ill-conditioned for any ridge up to 0.1.

    Source: normal equations of ridge regression (Hoerl and Kennard 1970); as a compensation of structured pruning in
    DVBP + OB2C, arXiv 2608.17657.
    """
    variance = covariance.diagonal()[kept]
    scale = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt() * (variance > 0)
    correlation = covariance[kept][:, kept] * scale[:, None] * scale[None, :]
    correlation.diagonal().add_((scale == 0).to(correlation.dtype))
    right = (covariance[removed][:, kept] * scale[None, :]).T
    while ridge <= _LARGEST_RIDGE:
        regular = correlation.clone()
        regular.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(regular)
        if int(info) == 0:
            solved = torch.cholesky_solve(right, factor)
            if bool(torch.isfinite(solved).all()):
                return solved.T * scale[None, :]
        ridge = max(ridge, 1e-12) * _GROWTH
    return None
