"""Damage curves: what the layers that read a group lose when so many of its units go, from one pass of statistics.

For a layer with weights W that reads x with covariance S, removing the positions R and letting the kept positions K absorb what
they can predict of them leaves ``tr(W_R S_R|K W_R^T)`` of mean squared error, where ``S_R|K`` is the covariance of x_R given x_K.
Order the positions so that those removed first come last. With the Cholesky factor S = L L^T, the lower right block of L is the
factor of ``S_R|K``, for every R that is a tail of the order. So the error of removing the tail from position p on is
``sum over j >= p of |(W L)_j|^2``: one factorisation gives the whole curve, at every number of units.

(The factor of a Schur complement: Golub and Van Loan, "Matrix computations", section 4.2. The error: Hassibi and Stork, NeurIPS
1992, as in :mod:`stp_fx.criteria.reconstruction`.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.consumers import Consumer, find_consumers
from stp_fx.analysis.groups import Group
from stp_fx.analysis.sites import SiteMember, find_sites
from stp_fx.errors import InputError
from stp_fx.measure.moments import Moments
from stp_fx.measure.statistics import Statistics

__all__ = ["damage_curves"]

_RIDGE = 1e-4
"""Added to the correlation matrix, as least-squares compensation adds it: what it cannot absorb, the curve must not count on."""
_GROWTH, _LARGEST_RIDGE = 100.0, 1e-1


def damage_curves(
    gm: fx.GraphModule, statistics: Statistics, groups: Sequence[Group], ranks: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """For every group the damage when its first 0, 1, ... units in the order of ``ranks`` are removed: float64 [units + 1] each.

    A damage is the fraction of the energy (variance) of a layer's output that is lost, summed over the layers that read the
    group. ``ranks``: int64 [units] a group, 0 for the unit that is removed first. Where two activations meet (query and key) the
    signal itself counts as the output.

    Raises:
        InputError: statistics without covariances, or of another graph.
    """
    sites, consumers = find_sites(gm), _by_site(gm)
    curves = []
    for group, rank in zip(groups, ranks, strict=True):
        total = np.zeros(group.size + 1)
        for member in sites.of(group):
            site = member.site
            for consumer in consumers.get((site.reader, site.source, site.dim), (None,)):
                total += _lost(gm, statistics, member, consumer, rank)
        curves.append(total)
    return curves


def _by_site(gm: fx.GraphModule) -> Mapping[tuple[str, str, int], tuple[Consumer, ...]]:
    found: dict[tuple[str, str, int], tuple[Consumer, ...]] = {}
    for consumer in find_consumers(gm):
        key = (consumer.site.reader, consumer.site.source, consumer.site.dim)
        found[key] = (*found.get(key, ()), consumer)
    return found


def _lost(
    gm: fx.GraphModule, statistics: Statistics, member: SiteMember, consumer: Consumer | None, rank: np.ndarray
) -> np.ndarray:
    """The fraction of one layer's output energy that is lost: float64 [units + 1]."""
    units = len(rank)
    when = np.full(member.site.size, units, dtype=np.int64)  # positions of other groups stay
    np.minimum.at(when, member.index, rank[member.unit])
    by_rank, energy = np.zeros(units + 1), 0.0
    for covariance, weight, own in _blocks(gm, statistics, member, consumer, when):
        if not (own < units).any():
            energy += float((weight @ covariance).mul_(weight).sum())
            continue
        columns, whole = _columns(covariance, weight, own)
        by_rank += np.bincount(own, weights=columns, minlength=units + 1)
        energy += whole
    if energy <= 0:
        return np.zeros(units + 1)
    return np.concatenate([[0.0], np.cumsum(by_rank[:units])]) / energy


def _blocks(
    gm: fx.GraphModule, statistics: Statistics, member: SiteMember, consumer: Consumer | None, when: np.ndarray
) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    """For each convolution group: covariance [n, n] of what it reads, weight [outputs, n], and when each input goes [n]."""
    if consumer is None:
        covariance = _covariance(statistics.of(member.site), member.site.name)
        yield covariance, torch.eye(len(covariance), dtype=torch.float64), when
        return
    matrix = consumer.matrix(consumer.current(gm).detach().double().cpu())
    groups, _, into, taps = matrix.shape
    patch = statistics.patches.get(consumer.node)
    covariance = _covariance(statistics.of(member.site) if patch is None else patch, member.site.name)
    width = into if patch is None else into * taps
    for k in range(groups):
        part = slice(k * width, (k + 1) * width)
        own = when[k * into : (k + 1) * into]
        if patch is None:  # every tap is an output of its own that reads the same signal
            yield covariance[part, part], matrix[k].permute(0, 2, 1).reshape(-1, into), own
        else:
            yield covariance[part, part], matrix[k].reshape(-1, width), np.repeat(own, taps)


def _covariance(moments: Moments, name: str) -> torch.Tensor:
    if moments.covariance is None:
        raise InputError(f"the statistics at {name} have no covariance; collect them with covariance=True")
    return moments.covariance


def _columns(covariance: torch.Tensor, weight: torch.Tensor, when: np.ndarray) -> tuple[np.ndarray, float]:
    """The error that each input adds when it is removed after those before it (float64 [n]), and the output's energy."""
    order = np.argsort(-when, kind="stable")
    at = torch.from_numpy(order)
    scale = covariance.diagonal().clamp_min(0.0).sqrt()
    inverse = torch.where(scale > 0, scale.clamp_min(1e-300).reciprocal(), torch.zeros_like(scale))
    correlation = (covariance * inverse[:, None] * inverse[None, :])[at][:, at]
    factor = _factor(correlation)
    scaled = weight * scale
    mixed = (scaled[:, at] @ factor).square_().sum(0)
    columns = np.empty(len(order))
    columns[order] = mixed.numpy()
    return columns, float((weight @ covariance).mul_(weight).sum())


def _factor(correlation: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor with the least ridge that gives one."""
    ridge, constant = _RIDGE, (correlation.diagonal() <= 0).double()
    while True:
        regular = correlation.clone()
        regular.diagonal().add_(ridge + constant)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if not int(failed) or ridge > _LARGEST_RIDGE:
            return factor
        ridge *= _GROWTH
