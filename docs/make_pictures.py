"""Makes the pictures of the documentation, in docs/pictures.

Three views each of ResNet-18, ViT-B/16 and a block of MobileNetV2; charts of the demo's network, trained on digits (units kept,
sensitivity), and of the schedules. Needs the extra `demo`, and Graphviz's `dot` (without it, the
graphs are written as DOT text); a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import torch
import torchvision
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

import stp_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import Digits, SmallResNet, train

VIEWS = ("computational", "dependency", "combined")


def mobilenet_block() -> nn.Sequential:
    """A block between two convolutions, so that there is something that its channels are shared with."""
    layers = {"before": nn.Conv2d(3, 24, 3, padding=1), "block": InvertedResidual(24, 24, 1, 6), "after": nn.Conv2d(24, 10, 1)}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def main(folder: Path, epochs: int) -> None:
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
    charts(folder, epochs)


def charts(folder: Path, epochs: int) -> None:
    mpl.rcParams["svg.hashsalt"] = "stp_fx"  # the same file for the same data
    digits = Digits()
    model = SmallResNet()
    train(model, digits, epochs, lr=0.1)
    gm = stp_fx.trace(model, digits.test[0][:64])
    pruned = stp_fx.prune_graph(gm, criterion="magnitude", ratio=0.5, target="macs", scope="global")
    print(stp_fx.compare(gm, pruned).plot(folder / "digits-kept.svg"))
    print(stp_fx.sensitivity(gm, [digits.test]).plot(folder / "digits-sensitivity.svg"))
    for schedule in (stp_fx.schedules.Geometric(), stp_fx.schedules.Cubic(), stp_fx.schedules.Linear()):
        print(schedule.plot(folder / f"schedule-{type(schedule).__name__.lower()}.svg", ratio=0.75, steps=8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--epochs", type=int, default=6, help="of the demo's network")
    args = parser.parse_args()
    main(args.folder, args.epochs)
