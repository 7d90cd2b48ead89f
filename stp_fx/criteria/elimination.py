"""Greedy elimination: which unit is cheapest to remove next, once those that stay have absorbed the ones that went.

For inputs x with precision P = S^-1 and a consumer's weights W [positions, outputs], removing the positions J and
letting the others take over what they can predict of them costs ``tr(W_J^T (P_JJ)^-1 W_J)`` in mean squared error of the
outputs (Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992, for a
block of weights of a linear layer). With P_JJ = C C^T, L = P_:J C^-T and U = C^-1 W_J what is left is

    P <- P - L L^T        W <- W - L U

Only inner products of rows of W are needed: with G = W W^T and H = G_:J C^-T - L (U U^T) / 2, G <- G - L H^T - H L^T.
The columns of a few steps are gathered and subtracted in one matrix product, as in a blocked Cholesky factorisation:
n^3 operations for n positions, at the speed of matrix products.
"""

from __future__ import annotations

import torch

from stp_fx.errors import CriterionError

__all__ = ["Elimination", "precision"]

_PANEL = 64
"""Columns gathered before they are subtracted from the whole matrix."""


def precision(covariance: torch.Tensor, ridge: float, name: str) -> torch.Tensor:
    """Inverse of ``covariance`` [n, n] with ``ridge`` times its mean diagonal added to the diagonal; float64.

    Raises:
        CriterionError: it is not positive definite even so; names the site.
    """
    level = float(covariance.diagonal().mean())
    damped = covariance + torch.eye(len(covariance), dtype=torch.float64) * (ridge * level if level > 0 else 1e-30)
    try:
        return torch.cholesky_inverse(torch.linalg.cholesky(damped))
    except torch.linalg.LinAlgError:
        raise CriterionError(
            f"the covariance at {name} is not positive definite with a ridge of {ridge:g}; give a larger `ridge`, or more "
            "calibration data"
        ) from None


class Elimination:
    """The units of one group at one site. ``precision`` and ``gram`` are [n, n], n = units * block, unit after unit.

    Both are used up.
    """

    def __init__(self, precision: torch.Tensor, gram: torch.Tensor, block: int) -> None:
        self._precision, self._gram, self._block = precision, gram, block
        self._units = len(gram) // block
        self._own_precision, self._own_gram = self._diagonal(precision), self._diagonal(gram)
        self._left = torch.zeros(len(gram), 0, dtype=torch.float64)
        self._half = torch.zeros_like(self._left)

    def costs(self) -> torch.Tensor:
        """What removing each unit next costs: float64 [units]; not meaningful for those that are gone."""
        if self._block == 1:
            return (self._own_gram / self._own_precision).reshape(-1)
        factor, _ = torch.linalg.cholesky_ex(self._own_precision)
        return torch.cholesky_solve(self._own_gram, factor).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Removes one unit: the others absorb it."""
        rows = slice(unit * self._block, (unit + 1) * self._block)
        factor = torch.linalg.cholesky(self._own_precision[unit])
        left = self._solved(self._column(self._precision, rows, self._left, self._left), factor)
        gram = self._solved(self._column(self._gram, rows, self._left, self._half, symmetric=True), factor)
        inner = self._solved(self._solved(self._own_gram[unit], factor).T, factor)
        half = gram - 0.5 * left @ inner
        tall, wide = (part.reshape(self._units, self._block, -1) for part in (left, half))
        self._own_precision -= tall @ tall.mT
        self._own_gram -= tall @ wide.mT + wide @ tall.mT
        self._set_aside(unit)
        self._gather(left, half)

    def _set_aside(self, unit: int) -> None:
        """What is gone is left as the identity, so that the factorisations of all blocks at once go through."""
        self._own_precision[unit] = torch.eye(self._block, dtype=torch.float64)
        self._own_gram[unit] = 0.0

    def _column(
        self, whole: torch.Tensor, rows: slice, first: torch.Tensor, second: torch.Tensor, symmetric: bool = False
    ) -> torch.Tensor:
        """Columns of a matrix as they are now: what has been gathered is subtracted."""
        column = whole[:, rows] - first @ second[rows].T
        return column - second @ first[rows].T if symmetric else column

    def _gather(self, left: torch.Tensor, half: torch.Tensor) -> None:
        self._left = torch.cat([self._left, left], 1)
        self._half = torch.cat([self._half, half], 1)
        if self._left.shape[1] >= _PANEL:
            self._precision.addmm_(self._left, self._left.T, alpha=-1.0)
            self._gram.addmm_(self._left, self._half.T, alpha=-1.0)
            self._gram.addmm_(self._half, self._left.T, alpha=-1.0)
            self._left, self._half = self._left[:, :0], self._half[:, :0]

    def _diagonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """The blocks on the diagonal: [units, block, block]."""
        blocks = matrix.reshape(self._units, self._block, self._units, self._block)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()

    @staticmethod
    def _solved(columns: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """``columns`` times the inverse transpose of ``factor``."""
        return torch.linalg.solve_triangular(factor, columns.T, upper=False).T
