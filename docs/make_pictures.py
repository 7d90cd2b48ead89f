"""Makes the pictures of the documentation: python docs/make_pictures.py [FOLDER] (default: docs/pictures).

Three views each of ResNet-18, ViT-B/16 and a block of MobileNetV2, and the charts: units kept, sensitivity, schedules.
Needs Graphviz's `dot`, matplotlib and torchvision; half a minute.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib as mpl
import torch
import torchvision
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

import stp_fx

VIEWS = ("computational", "dependency", "combined")


def mobilenet_block() -> nn.Sequential:
    """A block between two convolutions, so that there is something that its channels are shared with."""
    layers = {"before": nn.Conv2d(3, 24, 3, padding=1), "block": InvertedResidual(24, 24, 1, 6), "after": nn.Conv2d(24, 10, 1)}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def main(folder: Path) -> int:
    if shutil.which("dot") is None:
        print("Graphviz's `dot` is not on this machine: apt-get install graphviz", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    models = {
        "resnet18": (torchvision.models.resnet18(weights=None), 224),
        "vit_b_16": (torchvision.models.vit_b_16(weights=None), 224),
        "mobilenet_v2_block": (mobilenet_block(), 32),
    }
    traced = {name: stp_fx.trace(model.eval(), torch.zeros(1, 3, size, size)) for name, (model, size) in models.items()}
    for name, gm in traced.items():
        graph = stp_fx.analyze(gm)
        for view in VIEWS:
            print(graph.draw(folder / f"{name}-{view}.svg", view=view))
    charts(traced["resnet18"], folder)
    return 0


def charts(gm: torch.fx.GraphModule, folder: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "stp_fx"  # the same file for the same data
    pruned = stp_fx.prune_graph(gm, criterion="magnitude", ratio=0.5, target="macs", scope="global")
    print(stp_fx.compare(gm, pruned).plot(folder / "resnet18-kept.svg"))
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(1000, (4,))) for _ in range(2)]
    print(stp_fx.sensitivity(gm, batches, ratios=(0.25, 0.5, 0.75)).plot(folder / "resnet18-sensitivity.svg"))
    for schedule in (stp_fx.schedules.Geometric(), stp_fx.schedules.Cubic(), stp_fx.schedules.Linear()):
        print(schedule.plot(folder / f"schedule-{type(schedule).__name__.lower()}.svg", ratio=0.75, steps=8))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"))
