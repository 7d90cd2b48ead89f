"""Seconds of every node of a graph, measured on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from stp_fx.analysis.calibration import device_of, evaluating
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.unit_costs import Work, activation_elements, contraction_macs
from stp_fx.ir.state import example_of, state_of

__all__ = ["latency_work", "node_seconds"]

_CACHE = "node_seconds"
_COMPUTES = ("call_module", "call_function", "call_method")


def node_seconds(gm: fx.GraphModule, runs: int = 5) -> dict[str, float]:
    """Median seconds of every node that computes, over ``runs`` runs of the recorded example, after one to warm up.

    Runs on the graph's device, in eval mode and without gradients; random inputs, drawn without touching torch's own
    random state. Measured once for a graph and number of runs.

    Raises:
        InputError: ``gm`` carries no recorded example inputs.
    """
    cache = state_of(gm).cache.setdefault(_CACHE, {})
    key = (gm.code, str(device_of(gm)), runs, tuple(p.shape for p in gm.parameters()))
    if key not in cache:
        cache[key] = _measure(gm, runs)
    return cache[key]


def latency_work(gm: fx.GraphModule, graph: ChannelGraph, runs: int) -> Iterator[Work]:
    """Each node's seconds, spread over its contractions by their MACs, or else over the elements that it gives."""
    seconds = node_seconds(gm, runs)
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


def _measure(gm: fx.GraphModule, runs: int) -> dict[str, float]:
    device = device_of(gm)
    draws = torch.Generator().manual_seed(0)
    inputs = [_filled(value, device, draws) for value in example_of(gm)]
    stopwatch = _Stopwatch(gm, device)
    with evaluating(gm), torch.no_grad():
        stopwatch.run(*inputs)
        stopwatch.seconds.clear()
        for _ in range(runs):
            stopwatch.run(*inputs)
    return {name: statistics.median(times) for name, times in stopwatch.seconds.items()}


class _Stopwatch(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, device: torch.device) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.seconds: dict[str, list[float]] = {}
        self._device = device

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in _COMPUTES:
            return super().run_node(n)
        _wait(self._device)
        start = time.perf_counter()
        result = super().run_node(n)
        _wait(self._device)
        self.seconds.setdefault(n.name, []).append(time.perf_counter() - start)
        return result


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _filled(value: Any, device: torch.device, draws: torch.Generator) -> Any:
    """A recorded meta tensor as real data: random numbers, or zeros for integers, which may be indices."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=draws).to(device, value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype, device=device)
