"""Cells that the retention tables lack and the rule of ``criterion="auto"`` asks for: criteria without data, the global scope.

    python benchmarks/_auto_cells.py [--networks resnet,mobilenet,vit] [--targets 0.3,0.5] [--stages global,weights]

The networks, the calibration images and the 3,000 held-out training images are those of ``retention-repairs.json``. Criteria that
read weights alone are tried without repair, with and without BatchNorm measured again; in the global scope, magnitude, variance
and reconstruction with least squares. Every cell is written to ``results/auto-cells.json`` as it is done; the next run keeps it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from _common import RESULTS, machine
from _fashion import Fashion, load
from _opponent import has_batchnorm
from retention import CALIBRATION
from torch import fx

import stp_fx
from stp_fx.passes import (
    CollectStatistics,
    CompensateLeastSquares,
    Pipeline,
    RecalibrateBatchNorm,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
)

NO_DATA = {"global": ("magnitude", "bn_scale", "lamp"), "local": ("magnitude", "bn_scale", "fpgm")}  # lamp keeps the order
WITH_DATA = ("magnitude", "variance", "reconstruction")
OUT = RESULTS / "auto-cells.json"
HELD_OUT = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet,mobilenet,vit")
    parser.add_argument("--targets", default="0.3,0.5", help="fractions of the MACs to remove")
    parser.add_argument("--stages", default="global,weights", help="which of the two kinds of cells")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Fashion()
    results: dict[str, Any] = json.loads(OUT.read_text())["results"] if OUT.exists() else {}
    tried = {"global": with_least_squares, "weights": with_weights_alone}
    for stage in arguments.stages.split(","):
        for name in arguments.networks.split(","):
            gm = stp_fx.trace(load(name), data.test_x[:1])
            for target in map(float, arguments.targets.split(",")):
                for key, accuracies in tried[stage](gm, data, target, results.setdefault(f"{name} {target:g}", {})):
                    results[f"{name} {target:g}"][key] = accuracies
                    OUT.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def with_weights_alone(
    gm: fx.GraphModule, data: Fashion, target: float, known: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    for scope, criteria in NO_DATA.items():
        for criterion in criteria:
            key = f"{criterion}, {scope}, none"
            if key not in known and (criterion != "bn_scale" or has_batchnorm(gm)):
                select = SelectUnits(target, target="macs", scope=scope)
                yield from tested(key, Pipeline(ScoreUnits(criterion), select, RemoveChannels())(gm).graph_module, data)


def with_least_squares(
    gm: fx.GraphModule, data: Fashion, target: float, known: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    keys = {f"{criterion}, global, least squares": criterion for criterion in WITH_DATA}
    if all(key in known for key in keys):
        return
    measured = CollectStatistics(data.calibration(CALIBRATION), covariance=True, maps=True, patches=1200)(gm).artifacts
    for key, criterion in keys.items():
        scored = ScoreUnits(criterion)(gm, measured).artifacts
        select = SelectUnits(target, target="macs", scope="global")
        yield from tested(key, Pipeline(select, CompensateLeastSquares(), RemoveChannels())(gm, scored).graph_module, data)


def tested(key: str, pruned: fx.GraphModule, data: Fashion) -> Iterator[tuple[str, float]]:
    """Accuracy on held-out images, also with BatchNorm recalibrated, of a network with one."""
    images = data.held_out(HELD_OUT, CALIBRATION)
    yield key, data.accuracy(pruned, images)
    if has_batchnorm(pruned):
        again = RecalibrateBatchNorm(data.calibration(CALIBRATION))(pruned).graph_module
        yield f"{key} + BN", data.accuracy(again, images)


if __name__ == "__main__":
    main()
