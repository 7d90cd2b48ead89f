"""Reconstruction: the error that removing a unit leaves once the others have absorbed what they can of it.

Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992, for whole units of
a layer's input in place of single weights: with the covariance S of what a layer reads and its weights W, unit j costs
``|W_j|^2 / [S^-1]_jj``. :mod:`stp_fx.criteria.elimination` has the mathematics of the steps that follow.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from stp_fx.analysis.consumers import find_consumers
from stp_fx.analysis.groups import Group
from stp_fx.analysis.sites import SiteMember
from stp_fx.checks import is_number, shown
from stp_fx.criteria.base import ScoreContext, register
from stp_fx.criteria.elimination import Elimination, precision
from stp_fx.criteria.reduce import check_combining, normalize_scores, reduce_scores
from stp_fx.errors import CriterionError, InputError

__all__ = ["Reconstruction", "divides_evenly"]


@register("reconstruction")
@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Greedy removal of the cheapest unit, again and again; a unit's score is the error accumulated at its removal.

    The error is the mean square by which the outputs of the layers that read the group differ, after the best linear
    use of the kept units, summed over outputs; ``reduction`` joins the inputs that read the group (default: their sum) at
    every step. So scores rise in the order of removal, are never negative, and a prefix of them is a plan whose error is
    the score of its last unit; groups compare by errors. A unit with several positions is removed as a block.

    ``ridge`` is added to the covariance's diagonal, relative to its mean: the less data there is, the larger it should
    be. In a grouped convolution only inputs of the same group absorb each other. Where no weight is read
    (query and key meet) the unit's own signal is reconstructed:
    W is the identity. Taps of a kernel count as outputs that read the same signal.

    Time is cubic in an activation input's positions, in float64 on the CPU (2048 units: seconds), where norms are linear.

    Raises :class:`CriterionError` without covariances, and for a group that no contraction reads.
    """

    ridge: float = 1e-4
    reduction: str = "sum"
    normalizer: str = "none"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)

    def __post_init__(self) -> None:
        if not is_number(self.ridge) or not 0 < self.ridge <= 1:
            raise InputError(f"the ridge is a number above 0 and at most 1; got {shown(self.ridge)}")
        check_combining(self.reduction, self.normalizer)

    def __call__(self, group: Group, context: ScoreContext) -> torch.Tensor:
        sites = [each for member in context.site_members(group) for each in self._eliminations(member, group, context)]
        scores, removed, error = np.zeros(group.size), np.zeros(group.size, dtype=bool), 0.0
        for _ in range(group.size):
            local = np.stack([site.costs().numpy() for site in sites])
            local = np.maximum(local, 0.0)  # rounding may leave a negative rest
            costs = np.where(removed, np.inf, reduce_scores(local, self.reduction))
            cheapest = int(costs.argmin())
            error += float(costs[cheapest])
            scores[cheapest], removed[cheapest] = error, True
            for site in sites:
                site.remove(cheapest)
        return torch.from_numpy(normalize_scores(scores, self.normalizer))

    def _eliminations(self, member: SiteMember, group: Group, context: ScoreContext) -> list[Elimination]:
        """One a weight that reads the site; one in all where no weight does."""
        positions, block = _by_unit(member, group)
        gm = context.graph_module()
        consumers = context.cached("consumers", lambda: find_consumers(gm))
        found = []
        for consumer in [c for c in consumers if c.site is member.site] or [None]:
            matrix = None if consumer is None else consumer.matrix(consumer.current(gm).detach().double().cpu())
            inverse = self._precision(member, 1 if matrix is None else len(matrix), context)
            at = torch.from_numpy(positions)
            gram = torch.eye(len(at), dtype=torch.float64) if matrix is None else _gram(matrix, positions)
            found.append(Elimination(inverse[at][:, at], gram, block))
        return found

    def _precision(self, member: SiteMember, conv_groups: int, context: ScoreContext) -> torch.Tensor:
        site = member.site
        assert context.statistics is not None
        covariance = context.statistics.of(site).covariance
        if covariance is None:
            raise CriterionError(
                f"the statistics at {site.name} have no covariance; collect them with CollectStatistics(..., covariance=True)"
            )

        def invert() -> torch.Tensor:
            together = _together(np.arange(site.size), site.size // conv_groups)
            return precision(covariance if conv_groups == 1 else covariance * together, self.ridge, site.name)

        # Kept only where another group needs it too: it is as large as the covariance.
        if len(np.unique(site.unit)) == len(np.unique(member.unit)):
            return invert()
        return context.cached(("precision", site.name, conv_groups, self.ridge), invert)


def _gram(matrix: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """Inner products of the weights that read the given inputs, float64 [positions, positions]; ``matrix`` is [groups, out,
    in, taps]. Inputs of different convolution groups share no output."""
    into = matrix.shape[2]
    group, column = (torch.from_numpy(each) for each in np.divmod(positions, into))
    rows = matrix.transpose(1, 2)[group, column].reshape(len(positions), -1)
    return (rows @ rows.T) * _together(positions, into)


def _together(positions: np.ndarray, into: int) -> torch.Tensor:
    """1 where two inputs belong to one convolution group of ``into`` inputs, else 0."""
    group = torch.from_numpy(positions // into)
    return (group[:, None] == group[None, :]).double()


def _by_unit(member: SiteMember, group: Group) -> tuple[np.ndarray, int]:
    """The site's positions, unit after unit, and how many each unit has.

    Raises:
        CriterionError: units with different numbers of positions, or that share one.
    """
    if not divides_evenly(member, group):
        raise CriterionError(
            f"the units of group {group.name!r} do not divide the positions of {member.site.name} evenly among them, so "
            "no unit can be reconstructed alone; put the group in `ignore`, or use a criterion that reads weights"
        )
    return member.index[np.lexsort((member.index, member.unit))], len(member.index) // group.size


def divides_evenly(member: SiteMember, group: Group) -> bool:
    """Whether every unit of ``group`` has as many positions at the site as every other, and shares none."""
    counts = np.bincount(member.unit, minlength=group.size)
    return bool(counts.min() == counts.max()) and len(np.unique(member.index)) == len(member.index)
