"""CompensateLeastSquares: the kept inputs' weights absorb what they can of the removed ones (report, section 1.5.1)."""

from __future__ import annotations

import dataclasses

from stp_fx.checks import is_number, shown
from stp_fx.errors import InputError
from stp_fx.passes.compensate_mean import CompensateMean
from stp_fx.rewrite.compensation import LeastSquares, Method

__all__ = ["CompensateLeastSquares"]


@dataclasses.dataclass(frozen=True)
class CompensateLeastSquares(CompensateMean):
    """The kept channels' weights absorb what the others carried: ``W_K += W_P S_PK (S_KK + ridge)^-1``, with the mean exact.

    The consumer's output is then the best linear reconstruction of what it was, on the calibration data. Convolutions with
    several taps: over all taps where :class:`CollectStatistics` kept their ``patches``, else channel by channel with one
    matrix for every tap (best for each tap alone). Needs ``covariance``. The mean alone is compensated, with a log
    message, where a system is too ill-conditioned, for weights computed from others, and for transposed convolutions
    whose outputs overlap.

    ``ridge`` is relative to each channel's variance.
    """

    ridge: float = 1e-4

    def __post_init__(self) -> None:
        if not is_number(self.ridge) or not 0 <= self.ridge < 1:
            raise InputError(f"the ridge is a number in [0, 1), relative to the variance; got {shown(self.ridge)}")

    def method(self) -> Method:
        return LeastSquares(self.ridge)
