"""One network of ship.py: ``python _ship_worker.py NAME ROUNDS COMPILE`` prints one line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from _common import median
from torch import fx

import stp_fx

NETWORKS = ("resnet50", "mobilenet_v3_large", "vit_b_16", "convnext_tiny")
X = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
VARIANTS: dict[str, dict[str, Any]] = {
    "half of the MACs": {"target": "macs"},
    "half of the MACs, multiples of 8": {"target": "macs", "round_to": 8},
    "half of the MACs, multiples of 16": {"target": "macs", "round_to": 16},
    "half of the MACs, multiples of 32": {"target": "macs", "round_to": 32},
    "half of the latency": {"target": "latency"},
    "half of the latency, multiples of 8": {"target": "latency", "round_to": 8},
}
Run = Callable[[], Any]


def eager(gm: fx.GraphModule) -> Run:
    return lambda: gm(X)


def compiled(gm: fx.GraphModule) -> Run:
    torch._dynamo.reset()
    optimised = torch.compile(gm)
    return lambda: optimised(X)


def onnx(gm: fx.GraphModule) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(gm, (X,), dynamo=True, verbose=False).save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: X.numpy()}
    found = torch.from_numpy(session.run(None, given)[0])
    torch.testing.assert_close(found, gm(X), rtol=1e-3, atol=1e-4)
    return lambda: session.run(None, given)


def in_turns(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a busy machine slows all of them alike."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: median(each) or 0.0 for name, each in times.items()}


def main(name: str, rounds: int, compile_too: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    gm = stp_fx.trace(torchvision.models.get_model(name, weights=None).eval(), X, validate=False)
    graphs = {"before": gm}
    for variant, options in VARIANTS.items():
        graphs[variant] = stp_fx.prune_graph(gm, "magnitude", 0.5, **options, validate=False)
    macs = {variant: stp_fx.cost(graph).macs for variant, graph in graphs.items()}
    seconds: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        seconds["eager"] = in_turns({variant: eager(graph) for variant, graph in graphs.items()}, rounds)
        seconds["onnx"] = in_turns({variant: onnx(graph) for variant, graph in graphs.items()}, rounds)
        if compile_too:
            best = max(VARIANTS, key=lambda v: macs[v] / seconds["eager"][v])  # realises most
            chosen = {variant: compiled(graphs[variant]) for variant in ("before", best)}
            seconds["compiled"] = in_turns(chosen, rounds)
    print(json.dumps({"macs": macs, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True")
