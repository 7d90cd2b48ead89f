"""How far the means and variances of consumers' outputs are from what they were: a diagnostic of compensation."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.consumers import find_consumers
from stp_fx.analysis.survivors import Survivors
from stp_fx.errors import InputError
from stp_fx.ir.modes import OneMode, modes_of
from stp_fx.ir.provenance import provenance_of
from stp_fx.measure.calibration import arguments_of, batches, eval_twin, reiterable
from stp_fx.measure.moments import Moments, RunningMoments
from stp_fx.rewrite.bias import sole_norm
from stp_fx.typed import from_numpy

__all__ = ["ConsumerShift", "MeanCheck", "mean_check"]


@dataclasses.dataclass(frozen=True)
class ConsumerShift:
    """One consumer. ``mean``: root mean square, over output channels, of the mean's change in standard deviations of the
    channel; ``variance``: the median of new variance over old."""

    node: str
    mean: float
    variance: float


@dataclasses.dataclass(frozen=True, repr=False)
class MeanCheck:
    """All consumers, in graph order; ``str`` gives a table."""

    consumers: tuple[ConsumerShift, ...]

    def __repr__(self) -> str:
        return f"MeanCheck({len(self.consumers)} consumers; the largest shift of a mean is {self.worst:.3g} standard deviations)"

    @property
    def worst(self) -> float:
        """The largest shift of a mean, in standard deviations."""
        return max((c.mean for c in self.consumers), default=0.0)

    def __str__(self) -> str:
        from stp_fx.terminal import Console, Table

        out = io.StringIO()
        table = Table(title="outputs of consumers, after over before")
        table.add_column("consumer")
        table.add_column("shift of the mean (std)", justify="right")
        table.add_column("variance", justify="right")
        for each in self.consumers:
            table.add_row(each.node, f"{each.mean:.4f}", f"{each.variance:.3f}")
        Console(file=out, width=110, force_terminal=False).print(table)
        return out.getvalue().rstrip()


def mean_check(before: fx.GraphModule, after: fx.GraphModule, calibration: Iterable[Any]) -> MeanCheck:
    """Runs both graphs on the same batches in eval mode and compares the outputs of every consumer.

    ``after`` is ``before`` with units masked or removed; only its kept channels are compared. Where a consumer
    is followed by a BatchNorm, the norm's output is compared: a shift may be in its running mean. Earlier
    consumers' errors show in later ones, as in use.

    Raises:
        InputError: ``after`` does not come from ``before``, or the data does not fit.
    """
    data = reiterable(calibration)
    survivors = _survivors(before, after)
    nodes = [c.node for c in find_consumers(before)]
    dims = {c.node: c.channel for c in find_consumers(before)}
    pairs = {n: (_looked_at(before, n), _looked_at(after, n)) for n in nodes if _has(before, n) and _has(after, n)}
    old = _output_moments(before, {n: (pair[0], dims[n]) for n, pair in pairs.items()}, data)
    new = _output_moments(after, {n: (pair[1], dims[n]) for n, pair in pairs.items()}, data)
    graph = analyze(before)
    removed = provenance_of(after).masked is None
    rows: list[ConsumerShift] = []
    for name, (place, _) in pairs.items():
        keep = survivors.flags(graph.value(place).dims[dims[name]])
        rows.append(_compared(name, old[name], new[name], keep, keep[keep] if removed else keep))
    return MeanCheck(tuple(rows))


def _survivors(before: fx.GraphModule, after: fx.GraphModule) -> Survivors:
    state = provenance_of(after)
    plan = state.plan if state.masked is None else state.masked
    return analyze(before).survivors(plan, partial=True)


def _has(gm: fx.GraphModule, name: str) -> bool:
    """Whether evaluation runs the node."""
    return any(node.name == name for node, mode in modes_of(gm.graph) if mode != "train")


def _looked_at(gm: fx.GraphModule, name: str) -> str:
    """The consumer's node, or the one behind it that holds its shift."""
    node = next(n for n in gm.graph.nodes if n.name == name)
    if sole_norm(gm, name) is not None:
        return next(iter(node.users)).name
    added = {f"{name}_bias"}.intersection(provenance_of(gm).added)
    for user in node.users:
        if added and any(n.op == "get_attr" and n.target in added for n in user.all_input_nodes):
            return user.name
    return name


class _OutputReader(OneMode):
    def __init__(self, gm: fx.GraphModule, wanted: Mapping[str, list[tuple[str, int]]]) -> None:
        super().__init__(eval_twin(gm), gm.graph)
        self.wanted = wanted
        self.running: dict[str, RunningMoments] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for name, channel in self.wanted.get(n.name, ()):
            if not self.running.setdefault(name, RunningMoments(channel % value.dim())).add(value):
                raise InputError(f"node {n.name!r} gives values that are not finite")
        return value


def _output_moments(gm: fx.GraphModule, places: Mapping[str, tuple[str, int]], data: Iterable[Any]) -> dict[str, Moments]:
    wanted: dict[str, list[tuple[str, int]]] = {}
    for name, (place, channel) in places.items():
        wanted.setdefault(place, []).append((name, channel))
    reader = _OutputReader(gm, wanted)
    with torch.no_grad():
        for batch in batches(gm, data, "checking means"):
            reader.run(*arguments_of(gm, batch))
    return {name: running.result() for name, running in reader.running.items()}


def _compared(name: str, old: Moments, new: Moments, keep: np.ndarray, mine: np.ndarray) -> ConsumerShift:
    """``keep`` flags the kept channels in the old output, ``mine`` those in the new one."""
    if len(old.mean) != len(keep) or len(new.mean) != len(mine):
        raise InputError(f"node {name!r} has {len(new.mean)} channels, not {len(mine)}: the graphs do not belong together")
    first, second = from_numpy(keep), from_numpy(mine)
    spread = old.variance[first].clamp_min(1e-30)
    shift = (new.mean[second] - old.mean[first]).square() / spread
    return ConsumerShift(name, float(shift.mean().sqrt()), float((new.variance[second] / spread).median()))
