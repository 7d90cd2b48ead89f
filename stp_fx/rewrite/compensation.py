"""Compensation: consumers' kept weights and biases take over what the removed units contributed.

Report, section 1.5.1. Weights and biases are corrected before the units are masked or removed. A consumer is corrected once
for all inputs that a plan removes from it, of whatever groups.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.consumers import Consumer, find_consumers
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.plan import PrunePlan
from stp_fx.analysis.sites import find_sites
from stp_fx.analysis.survivors import Survivors
from stp_fx.errors import InputError
from stp_fx.ir.streamed import Streamed
from stp_fx.measure.statistics import Statistics
from stp_fx.rewrite.bias import add_to_bias
from stp_fx.rewrite.least_squares import reconstruction
from stp_fx.rewrite.removal import is_partial
from stp_fx.rewrite.slicing import copied

__all__ = ["LeastSquares", "MeanShift", "Method", "Use", "compensate", "compensate_streamed", "losing_uses", "mean_output"]

_log = logging.getLogger(__name__)


class Method(Protocol):
    """How consumers are compensated: the shift of a bias, after a change of the weight if need be."""

    name: ClassVar[str]

    def shift(self, gm: fx.GraphModule, result: fx.GraphModule, statistics: Statistics, uses: Sequence[Use]) -> torch.Tensor:
        """The vector that the bias of a weight's consumers gains, float64 [out]; may change the weight in ``result`` first."""
        ...


def compensate(
    gm: fx.GraphModule, plan: PrunePlan, statistics: Statistics, method: Method
) -> tuple[fx.GraphModule, dict[str, str]]:
    """A copy of ``gm`` whose consumers make up for the inputs that ``plan`` removes, and by group how they were compensated.

    The shapes are those of ``gm``; a copy that is equal in every number is returned where no consumer loses an input.

    Raises:
        PlanError: the plan does not fit.
    """
    graph = analyze(gm)
    losing = _by_weight(graph, losing_uses(gm, graph, graph.survivors(plan, partial=is_partial(gm))))
    result = copied(gm)
    with torch.no_grad():
        for uses in losing:
            add_to_bias(result, [use.consumer for use in uses], method.shift(gm, result, statistics, uses))
    result.recompile()
    return result, _by_group(gm, graph, result, losing)


def compensate_streamed(
    gm: fx.GraphModule, plan: PrunePlan, statistics: Statistics, method: Method, source: Streamed, target: Streamed
) -> None:
    """:func:`compensate` in place on ``target``, a copy of ``gm`` as ``source`` is; a weight is in memory while its consumers are
    compensated.

    Raises:
        PlanError: the plan does not fit.
    """
    graph = analyze(gm)
    losing = _by_weight(graph, losing_uses(gm, graph, graph.survivors(plan, partial=is_partial(gm))))
    nodes = [{node.name: node for node in each.module.graph.nodes} for each in (source, target)]
    with torch.no_grad():
        for uses in losing:
            for streamed, named in zip((source, target), nodes, strict=True):
                for use in uses:
                    streamed.load(named[use.consumer.node])
            weight = uses[0].consumer.weight
            before = None if weight is None else target.module.get_parameter(weight)._version
            shift = method.shift(source.module, target.module, statistics, uses)
            if not bool(torch.isfinite(shift).all()):  # of stand-ins
                raise InputError(
                    f"{uses[0].consumer.node} cannot be compensated: its weight is computed from parameters that are not in "
                    "memory then. Leave out `compensation`"
                )
            add_to_bias(target.module, [use.consumer for use in uses], shift)
            if weight is not None and target.module.get_parameter(weight)._version != before:
                target.keep(weight)
            source.release()
            target.release()
    target.module.recompile()


@dataclasses.dataclass(frozen=True)
class MeanShift:
    """``b += sum over the removed units of W mu``: the consumers' expected output stays what it was."""

    name: ClassVar[str] = "mean"

    def shift(self, gm: fx.GraphModule, result: fx.GraphModule, statistics: Statistics, uses: Sequence[Use]) -> torch.Tensor:
        return _average(
            statistics, uses, lambda use: mean_output(use.consumer, statistics, use.consumer.current(gm), use.removed)
        )


@dataclasses.dataclass(frozen=True)
class LeastSquares(MeanShift):
    """The kept channels' weights absorb what the others carried, with the mean exact; see
    :class:`stp_fx.passes.CompensateLeastSquares`."""

    name: ClassVar[str] = "least_squares"
    ridge: float = 1e-4

    def shift(self, gm: fx.GraphModule, result: fx.GraphModule, statistics: Statistics, uses: Sequence[Use]) -> torch.Tensor:
        consumer = uses[0].consumer
        old = consumer.current(gm).detach().double().cpu()
        possible = consumer.weight is not None and not consumer.overlaps
        new = self._absorbed(statistics, uses, old) if possible else None
        if new is None or consumer.weight is None:
            _log.warning("%s: least squares is not possible here, so the mean alone is compensated", consumer.node)
            return super().shift(gm, result, statistics, uses)
        parameter = result.get_parameter(consumer.weight)
        parameter.copy_(consumer.like(new, parameter))

        def lost(use: Use) -> torch.Tensor:
            everything = np.ones_like(use.removed)
            return mean_output(use.consumer, statistics, old, everything) - mean_output(
                use.consumer, statistics, parameter, ~use.removed
            )

        return _average(statistics, uses, lost)

    def _absorbed(self, statistics: Statistics, uses: Sequence[Use], weight: torch.Tensor) -> torch.Tensor | None:
        """The weight as [groups, out, in, taps] in which the kept inputs stand for all; the removed columns are unchanged."""
        consumer, removed = uses[0].consumer, uses[0].removed
        matrix = consumer.matrix(weight).clone()
        into, taps = matrix.shape[2:]
        with_taps = all(use.consumer.node in statistics.patches for use in uses)
        covariance = _covariance(statistics, uses, with_taps)
        for group, own in enumerate(matrix):
            flags = removed[group * into : (group + 1) * into]
            if flags.all() or not flags.any():
                continue
            blocks = _Block(np.flatnonzero(~flags), np.flatnonzero(flags), group * into, taps if with_taps else 1)
            absorbed = reconstruction(covariance, blocks.rows(blocks.kept), blocks.rows(blocks.removed), self.ridge)
            if absorbed is None:
                return None
            blocks.absorb(own, absorbed)
        return matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A consumer, and which of its input positions are removed (bool)."""

    consumer: Consumer
    removed: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """The kept and the removed inputs of one convolution group; ``start`` is its first input, each has ``taps`` rows."""

    kept: np.ndarray
    removed: np.ndarray
    start: int
    taps: int

    def rows(self, inputs: np.ndarray) -> torch.Tensor:
        """Rows of the covariance."""
        return torch.from_numpy(((self.start + inputs)[:, None] * self.taps + np.arange(self.taps)).reshape(-1))

    def absorb(self, matrix: torch.Tensor, absorbed: torch.Tensor) -> None:
        """Changes [out, in, taps] in place."""
        lost = matrix[:, torch.from_numpy(self.removed)]
        if self.taps > 1:
            gain = (lost.reshape(len(matrix), -1) @ absorbed).reshape(len(matrix), len(self.kept), self.taps)
        else:
            gain = torch.einsum("opt,pk->okt", lost, absorbed)
        matrix[:, torch.from_numpy(self.kept)] += gain


def mean_output(consumer: Consumer, statistics: Statistics, weight: torch.Tensor, inputs: np.ndarray) -> torch.Tensor:
    """The mean output of a consumer, without bias, that reads only the flagged inputs: float64 [out].

    The consumer is run on the mean of what it read, which is exact because it is linear.
    """
    site = consumer.site
    along = [1] * len(site.shape)
    along[site.dim] = -1
    mean = statistics.map_of(site)
    if mean is None:
        mean = statistics.of(site).mean.reshape(along).expand(1, *site.shape[1:])
    flags = torch.from_numpy(inputs).to(torch.float64).reshape(along)
    out = consumer.call(mean * flags, weight.detach().double().cpu())
    return out.movedim(consumer.channel, 0).reshape(out.shape[consumer.channel], -1).mean(1)


def losing_uses(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> list[Use]:
    """The consumers that lose inputs, in graph order; logs the ops with weights that are not among them."""
    found: list[Use] = []
    known = set()
    for consumer in find_consumers(gm):
        site = consumer.site
        removed = ~survivors.flags(graph.value(site.source).dims[site.dim])
        known.add((site.reader, site.source, site.dim))
        if removed.any():
            found.append(Use(consumer, removed))
    for site in find_sites(gm).all:
        if (site.reader, site.source, site.dim) not in known and site.weights:
            _log.info("%s is not compensated: its consumer is neither a linear layer nor a convolution", site.name)
    return found


def _by_group(gm: fx.GraphModule, graph: ChannelGraph, result: fx.GraphModule, losing: Sequence[Sequence[Use]]) -> dict[str, str]:
    """How the consumers of every group were compensated; where the weight is unchanged, through the bias alone."""
    methods: dict[tuple[str, str, int], str] = {}
    for use in (use for uses in losing for use in uses):
        site, weight = use.consumer.site, use.consumer.weight
        absorbed = weight is not None and not torch.equal(gm.get_parameter(weight), result.get_parameter(weight))
        methods[site.reader, site.source, site.dim] = "least_squares" if absorbed else "mean"
    found = {}
    for group in graph.groups:
        sites = [member.site for member in find_sites(gm).of(group) if member.site.weights]
        used = [methods.get((site.reader, site.source, site.dim), "") for site in sites]
        if any(used):
            found[group.name] = ", ".join(sorted(set(used) - {""})) + ("" if all(used) else " (in part)")
    return found


def _by_weight(graph: ChannelGraph, uses: Sequence[Use]) -> list[list[Use]]:
    """Uses of one weight together."""
    found: dict[str, list[Use]] = {}
    for use in uses:
        name = use.consumer.weight
        key = use.consumer.node if name is None else graph.first_name(name)
        found.setdefault(key, []).append(use)
    return list(found.values())


def _covariance(statistics: Statistics, uses: Sequence[Use], with_taps: bool) -> torch.Tensor:
    """That of all uses' observations together."""
    moments = [statistics.patches[u.consumer.node] if with_taps else statistics.of(u.consumer.site) for u in uses]
    total = sum(m.count for m in moments)
    mean = torch.stack([m.mean * (m.count / total) for m in moments]).sum(0)
    result = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for each in moments:
        if each.covariance is None:
            raise InputError("CompensateLeastSquares needs second moments: run CollectStatistics with covariance=True before it")
        delta = each.mean - mean
        result += (each.covariance + torch.outer(delta, delta)) * (each.count / total)
    return result


def _average(statistics: Statistics, uses: Sequence[Use], shift: Callable[[Use], torch.Tensor]) -> torch.Tensor:
    """The mean of the uses' shifts, by how often each was seen."""
    counts = [statistics.of(use.consumer.site).count for use in uses]
    return torch.stack([shift(use) * (n / sum(counts)) for use, n in zip(uses, counts, strict=True)]).sum(0)
