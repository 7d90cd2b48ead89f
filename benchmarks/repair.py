"""Repairs by training beside those by regression: accuracy right after pruning, and the seconds that each repair takes.

    python benchmarks/repair.py [--networks vit,resnet] [--targets 0.7,0.5] [--steps 100] [--resume]
        [--out benchmarks/results/repair]

Networks trained on Fashion-MNIST (``_fashion.py``), pruned by one plan a cell (reconstruction criterion, isomorphic scope) and
repaired on the same images without labels: not at all, by least squares (and BatchNorm recalibrated), layer after layer
(sequential), block after block (block-wise), and as a whole (distillation), these two from the pruned network and from what the
sequential repair has made. Blocks and whole are given as many steps, which take about as long. Seconds are those of the processor
in one thread, so that other work on the machine counts little; statistics of least squares are not among them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from _fashion import Fashion, load
from _opponent import has_batchnorm

import stp_fx
from stp_fx.passes import (
    CollectStatistics,
    CompensateLeastSquares,
    Distill,
    GraphPass,
    Pipeline,
    RecalibrateBatchNorm,
    ReconstructBlockwise,
    ReconstructSequentially,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
)

CALIBRATION, BATCH = 1024, 64
Cell = dict[str, Any]


def repairs(batches: list[Any], steps: int) -> dict[str, Callable[[], GraphPass] | None]:
    """By name; those that are tried."""
    return {
        "none": None,
        "least squares": CompensateLeastSquares,
        "sequential": lambda: ReconstructSequentially(batches),
        "sequential, block-wise": lambda: ReconstructBlockwise(batches, steps),
        "sequential, distillation": lambda: Distill(batches, steps),
        "block-wise": lambda: ReconstructBlockwise(batches, steps, start=None),
        "distillation": lambda: Distill(batches, steps, start=None),
    }


def fill(cell: Cell, name: str, target: float, data: Fashion, steps: int, written: Callable[[], None]) -> None:
    """Tries the repairs that a cell lacks."""
    batches, model = data.calibration(CALIBRATION, BATCH), load(name)
    cell.setdefault("unpruned", data.accuracy(model))
    gm = stp_fx.trace(model, data.test_x[:1])
    collect = CollectStatistics(batches, covariance=True, maps=True, patches=1200)
    select = SelectUnits(target, target="macs", scope="isomorphic")
    selected = Pipeline(collect, ScoreUnits("reconstruction"), select)(gm).artifacts
    for repair, make in repairs(batches, steps).items():
        if repair in cell["repairs"]:
            continue
        start = time.process_time()
        passes = () if make is None else (make(),)
        repaired = Pipeline(*passes)(gm, selected)
        seconds = time.process_time() - start
        pruned = RemoveChannels()(repaired.graph_module, selected).graph_module
        if repair == "least squares" and has_batchnorm(pruned):
            pruned = RecalibrateBatchNorm(batches)(pruned).graph_module
        cell["repairs"][repair] = {"accuracy": data.accuracy(pruned), "seconds": seconds}
        written()


def report(out: Path, results: dict[str, Cell], steps: int) -> str:
    """Written after every repair; gives the table."""
    rows = [
        [
            f"{name} {found['unpruned']:.2%}",
            *(
                f"{found['repairs'][each]['accuracy']:.2%} ({found['repairs'][each]['seconds']:.0f} s)"
                if each in found["repairs"]
                else "-"
                for each in repairs([], steps)
            ),
        ]
        for name, found in results.items()
    ]
    table = markdown_table(("network, MACs removed, unpruned", *repairs([], steps)), rows)
    text = f"""# Repair: training on unlabelled data beside regression

{markdown_machine(machine())}

Fashion-MNIST, accuracy on 10,000 test images (processor seconds of the repair, one thread, on a machine that did other work). One
plan a row: reconstruction criterion, isomorphic scope. {CALIBRATION} training images without labels in batches of {BATCH}, of
which the repairs that train hold out one eighth; {steps} steps a block, and {steps} steps for the whole, which take about as
long. "Sequential, block-wise" begins with the sequential repair, whose seconds are in its own. Least squares: with BatchNorm
recalibrated; its statistics are not in the seconds.

{table}
"""
    write(out, text, {"machine": machine(), "results": results})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="vit,resnet")
    parser.add_argument("--targets", default="0.7,0.5", help="fractions of the MACs to remove")
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer, a block, and for the whole")
    parser.add_argument("--resume", action="store_true", help="keep what the result file has")
    parser.add_argument("--out", type=Path, default=RESULTS / "repair")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, kept = Fashion(), arguments.out.with_suffix(".json")
    results: dict[str, Cell] = json.loads(kept.read_text())["results"] if arguments.resume and kept.exists() else {}
    for target in map(float, arguments.targets.split(",")):
        for name in arguments.networks.split(","):
            cell = results.setdefault(f"{name} {target:g}", {"repairs": {}})
            fill(cell, name, target, data, arguments.steps, lambda: report(arguments.out, results, arguments.steps))
    wide_console().print(report(arguments.out, results, arguments.steps))


if __name__ == "__main__":
    main()
