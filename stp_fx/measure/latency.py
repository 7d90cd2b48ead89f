"""Seconds of every node of a graph, measured on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.unit_costs import Work, activation_elements, contraction_macs
from stp_fx.ir.modes import OneMode, is_mark
from stp_fx.ir.provenance import example_of, provenance_of
from stp_fx.measure.calibration import device_of, eval_twin
from stp_fx.measure.distributed import agreed

__all__ = ["example_values", "latency_work", "node_seconds", "take_turns", "whole_seconds"]

_COMPUTES = ("call_module", "call_function", "call_method")


def node_seconds(gm: fx.GraphModule, runs: int = 5) -> dict[str, float]:
    """Median seconds of every node that computes, over ``runs`` runs of the recorded example, after one to warm up.

    Runs on the graph's device, in eval mode and without gradients; random inputs, drawn without touching torch's own
    random state. Every call measures again.

    Raises:
        InputError: ``gm`` carries no recorded example inputs.
    """
    return take_turns([gm], runs)[0]


def latency_work(graph: ChannelGraph, seconds: Mapping[str, float]) -> Iterator[Work]:
    """Each node's seconds, spread over its contractions by their MACs, or else over the elements of its value."""
    pieces: dict[str, list[Work]] = {}
    for piece in contraction_macs(graph):
        pieces.setdefault(piece.where, []).append(piece)
    for piece in activation_elements(graph, [name for name in seconds if name not in pieces]):
        pieces.setdefault(piece.where, []).append(piece)
    for name, parts in pieces.items():
        total = sum(piece.amount for piece in parts)
        for piece in parts:
            if total and name in seconds:
                yield Work(name, seconds[name] * piece.amount / total, piece.factors)


def take_turns(
    graphs: Sequence[fx.GraphModule], runs: int, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, float]]:
    """Median seconds of every node of each graph, on its recorded example; the graphs take turns, so that a busy machine
    slows all of them alike. One run each to warm up. All processes of a distributed job get the times of rank 0."""
    stopwatches = [_Stopwatch(gm, device_of(gm), clock) for gm in graphs]
    inputs = [example_values(gm) for gm in graphs]
    for turn in range(runs + 1):
        for stopwatch, arguments in zip(stopwatches, inputs, strict=True):
            with torch.no_grad():
                stopwatch.run(*arguments)
            if turn == 0:
                stopwatch.seconds.clear()
    return agreed([{name: statistics.median(times) for name, times in s.seconds.items()} for s in stopwatches])


def whole_seconds(graphs: Sequence[fx.GraphModule], runs: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Median seconds of a call of each graph, on its recorded example, in turns. One call each to warm up."""
    times: list[list[float]] = [[] for _ in graphs]
    inputs = [example_values(gm) for gm in graphs]
    twins = [eval_twin(gm) for gm in graphs]
    for turn in range(runs + 1):
        for gm, arguments, found in zip(twins, inputs, times, strict=True):
            with torch.no_grad():
                _wait(device_of(gm))
                start = clock()
                gm(*arguments)
                _wait(device_of(gm))
            if turn:
                found.append(clock() - start)
    return agreed([statistics.median(found) for found in times])


def example_values(gm: fx.GraphModule) -> tuple[Any, ...]:
    """The recorded example as real data on the graph's device: random numbers, zeros for integers, which may be indices.

    Whole numbers that the forward read are those of the example. The same numbers every time; torch's own random state is not
    changed.
    """
    draws, device, read = torch.Generator().manual_seed(0), device_of(gm), provenance_of(gm).read
    values = [_filled(value, device, draws) for value in example_of(gm)]
    return tuple(read[k].to(device) if k in read else value for k, value in enumerate(values))


class _Stopwatch(OneMode):
    def __init__(self, gm: fx.GraphModule, device: torch.device, clock: Callable[[], float]) -> None:
        super().__init__(eval_twin(gm), gm.graph)
        self.seconds: dict[str, list[float]] = {}
        self._device, self._clock = device, clock

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in _COMPUTES or n in self.left_out or is_mark(n):
            return super().run_node(n)
        _wait(self._device)
        start = self._clock()
        result = super().run_node(n)
        _wait(self._device)
        self.seconds.setdefault(n.name, []).append(self._clock() - start)
        return result


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _filled(value: Any, device: torch.device, draws: torch.Generator) -> Any:
    """A recorded meta tensor as real data: random numbers, or zeros for integers, which may be indices."""
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(each, device, draws) for each in value)
    if isinstance(value, Mapping):
        return {key: _filled(each, device, draws) for key, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=draws).to(device, value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype, device=device)
