"""Greedy elimination: the unit that is cheapest to remove next, once the kept units have absorbed the removed ones.

For inputs x with precision P = S^-1 and a consumer's weights W [positions, outputs], removing the positions J and
letting the others take over what they can predict of them costs ``tr(W_J^T (P_JJ)^-1 W_J)`` in mean squared error of the
outputs (Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992, for a
block of weights of a linear layer). With P_JJ = C C^T, L = P_:J C^-T and U = C^-1 W_J, the rest becomes

    P <- P - L L^T        W <- W - L U

Only inner products of rows of W are needed: with G = W W^T and H = G_:J C^-T - L (U U^T) / 2, G <- G - L H^T - H L^T.
The columns of a few steps are gathered and subtracted in one matrix product, as in a blocked Cholesky factorisation:
n^3 operations for n positions, at the speed of matrix products, and rows of removed units are dropped on the way.
"""

from __future__ import annotations

import torch

from stp_fx.errors import CriterionError

__all__ = ["Elimination", "precision"]

_PANEL = 64
"""Columns gathered before they are subtracted from the whole matrix."""
_CROWDED = 0.85
"""Rows of removed units are dropped when less than this fraction is left: copies cost as much as products otherwise."""


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
    """The units of one group at one activation input. ``precision`` and ``gram`` are [n, n], n = units * block, unit after unit.

    Both are used up.
    """

    def __init__(self, precision: torch.Tensor, gram: torch.Tensor, block: int) -> None:
        self._block, units = block, len(gram) // block
        # Matrices of the units that were left when rows were last dropped: `order` lists them, `place` finds them.
        self._precision, self._gram = precision, gram
        self._order = torch.arange(units)
        self._place = list(range(units))
        self._kept = torch.ones(units, dtype=torch.bool)
        self._own_precision, self._own_gram = self._diagonal(precision), self._diagonal(gram)
        self._start_panel()

    def costs(self) -> torch.Tensor:
        """The cost of removing each unit next: float64 [units]; 0 for removed units."""
        if self._block == 1:
            return (self._own_gram / self._own_precision).reshape(-1)
        factor, _ = torch.linalg.cholesky_ex(self._own_precision)
        return torch.cholesky_solve(self._own_gram, factor).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Removes one unit: the others absorb it. Raises :class:`CriterionError` where rounding has left no precision."""
        factor, failed = torch.linalg.cholesky_ex(self._own_precision[unit])
        if failed:
            raise CriterionError("rounding has used up the digits of a covariance that is nearly singular; give a larger `ridge`")
        first = self._place[unit] * self._block
        rows = slice(first, first + self._block)
        gathered, halves = self._left[:, : self._width], self._half[:, : self._width]
        # Both are symmetric, and rows lie together in memory.
        precision = self._precision[rows].T - gathered @ gathered[rows].T
        gram = self._gram[rows].T - gathered @ halves[rows].T - halves @ gathered[rows].T
        left = _solved(precision, factor)
        inner = _solved(_solved(self._own_gram[unit], factor).T, factor)
        half = _solved(gram, factor) - 0.5 * left @ inner
        self._update_own(left, half)
        self._set_aside(unit)
        self._gather(left, half)

    def _update_own(self, left: torch.Tensor, half: torch.Tensor) -> None:
        tall, wide = (part.reshape(len(self._order), self._block, -1) for part in (left, half))
        crossed = tall @ wide.mT
        self._own_precision[self._order] -= tall @ tall.mT
        self._own_gram[self._order] -= crossed + crossed.mT
        removed = ~self._kept
        self._own_precision[removed], self._own_gram[removed] = self._identity, 0.0

    def _set_aside(self, unit: int) -> None:
        """Makes a removed unit's block the identity, so that all blocks can be factorised at once."""
        self._own_precision[unit], self._own_gram[unit], self._kept[unit] = self._identity, 0.0, False

    def _gather(self, left: torch.Tensor, half: torch.Tensor) -> None:
        stop = self._width + self._block
        self._left[:, self._width : stop], self._half[:, self._width : stop] = left, half
        self._width = stop
        if stop + self._block > self._left.shape[1]:
            self._subtract_panel()

    def _subtract_panel(self) -> None:
        """Subtracts the gathered columns; once enough units are removed, only from the rows and columns of the others."""
        kept = self._kept[self._order]
        left, half = self._left, self._half
        if float(kept.float().mean()) < _CROWDED:
            rows = torch.repeat_interleave(kept, self._block).nonzero().ravel()
            left, half = left[rows], half[rows]
            self._precision, self._gram = self._precision[rows][:, rows], self._gram[rows][:, rows]
            self._order = self._order[kept]
            for place, unit in enumerate(self._order.tolist()):
                self._place[unit] = place
        self._precision.addmm_(left, left.T, alpha=-1.0)
        self._gram.addmm_(torch.cat([left, half], 1), torch.cat([half, left], 1).T, alpha=-1.0)
        self._start_panel()

    def _start_panel(self) -> None:
        width = max(1, _PANEL // self._block) * self._block
        self._left, self._half = (torch.zeros(len(self._gram), width, dtype=torch.float64) for _ in range(2))
        self._identity = torch.eye(self._block, dtype=torch.float64)
        self._width = 0

    def _diagonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """The blocks on the diagonal: [units, block, block]."""
        blocks = matrix.reshape(len(self._order), self._block, len(self._order), self._block)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _solved(columns: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``columns`` times the inverse transpose of ``factor``."""
    if len(factor) == 1:
        return columns / factor
    return torch.linalg.solve_triangular(factor, columns.T, upper=False).T
