"""Timings of one process for ``engine.py``; prints one line of JSON.

network NAME ROUNDS PEER_ROUNDS | peer NAME | point CONTESTANT FAMILY SIZE ROUNDS
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import _families
import torch
import torchvision
from _common import median, peak_resident, reset_peak, timed
from _contestants import RATIO, bare_floor, describe, floor, halved, ours, prepare_peer, shapes_of, validated, warm_up
from torch import Tensor, nn

import stp_fx

LONG = 5.0  # seconds: what takes longer is not repeated in a growth curve


def load(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


def network(name: str, rounds: str, peer_rounds: str) -> dict[str, Any]:
    """All contestants on one network, taking turns."""
    model, example = load(name)
    warm_up()
    pruned = ours(model, example)
    kept, result = shapes_of(pruned), {"ours_result": describe(pruned, example)}
    parts_of = ("ours", "validated", "forward", "trace", "analysis", "prune", "peer", "floor", "bare_floor")
    times: dict[str, list[float]] = {key: [] for key in parts_of}
    del pruned
    for turn in range(max(int(rounds), int(peer_rounds))):
        if turn < int(rounds):
            times["ours"].append(_clean(lambda: ours(model, example))[0])
            seconds, checked = _clean(lambda: validated(model, example))
            times["validated"].append(seconds)
            with torch.no_grad():
                times["forward"].append(timed(lambda: model(example))[0])
            result["validation"] = stp_fx.report_of(checked).validation.to_dict()
            del checked
            times["floor"].append(_clean(lambda: floor(model, kept))[0])
            times["bare_floor"].append(_clean(lambda: bare_floor(model, kept))[0])
            for part, seconds in parts(model, example).items():
                times[part].append(seconds)
        if turn < int(peer_rounds):
            seconds, theirs = _clean(prepare_peer(model, example))
            times["peer"].append(seconds)
            result["peer_result"] = describe(theirs, example)
    medians = {key: median(values) for key, values in times.items()}
    return {**result, **medians, "times": times, "parameters": sum(p.numel() for p in model.parameters())}


def parts(model: nn.Module, example: Tensor) -> dict[str, float]:
    """The same work as :func:`ours`, stage by stage; the analysis is kept on the graph and not done twice."""
    trace_seconds, gm = _clean(lambda: stp_fx.trace(model, example, validate=False))
    analysis_seconds, _ = timed(lambda: stp_fx.analyze(gm))
    prune_seconds, _ = timed(lambda: stp_fx.prune_graph(gm, criterion="magnitude", ratio=RATIO, validate=False))
    return {"trace": trace_seconds, "analysis": analysis_seconds, "prune": prune_seconds}


def peer_alone(name: str) -> dict[str, Any]:
    """The peer on one network, for a process that may be stopped."""
    model, example = load(name)
    warm_up()
    seconds, pruned = timed(prepare_peer(model, example))
    return {"peer": seconds, "peer_result": describe(pruned, example)}


def point(contestant: str, family: str, size: str, rounds: str) -> dict[str, Any]:
    """Median seconds, and the first run's peak of resident memory over what the process held before it, in bytes."""
    model, example = _families.build(family, int(size))
    warm_up()
    kept = halved(model)
    calls: dict[str, Callable[[], Callable[[], Any]]] = {
        "stp_fx": lambda: lambda: ours(model, example),
        "torch-pruning": lambda: prepare_peer(model, example),
        "floor": lambda: lambda: floor(model, kept),
    }
    times: list[float] = []
    peak = 0
    while len(times) < int(rounds) and not (times and times[-1] > LONG):
        call = calls[contestant]()
        gc.collect()
        reset_peak()
        before = peak_resident()
        times.append(timed(call)[0])
        peak = peak or max(0, peak_resident() - before)
        del call
    return {"seconds": median(times), "peak_bytes": peak, "times": times}


def _clean(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time a call that does not pay for the garbage of the one before it."""
    gc.collect()
    return timed(call)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = {"network": network, "peer": peer_alone, "point": point}[sys.argv[1]]
    print(json.dumps(command(*sys.argv[2:])))
