"""Train a detector of torchvision on images of digits, prune its backbone, and go on in the same loop.

    python examples/prune_a_detector.py                                                # about ten minutes on one thread
    python examples/prune_a_detector.py --quick
    python examples/prune_a_detector.py --model ssdlite320_mobilenet_v3_large

No front end takes a detector of torchvision whole: its code picks boxes by their scores. Its backbone, which is nearly all of it,
is a graph like any other, and ``prune_submodule`` puts the pruned one in its place. Needs ``pip install "stp-fx[demo]"``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torchvision
from digit_scenes import SIDE, scenes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_tensor

import stp_fx

Data = list[tuple[Tensor, dict[str, Tensor]]]


def load(part: str, count: int) -> Data:
    """Images, and what detectors of torchvision take as targets: corners, and classes from 1 on."""
    data: Data = []
    for image, boxes in scenes(part, count):
        corners = torch.tensor([[x, y, x + s, y + s] for _, x, y, s in boxes], dtype=torch.float32)
        data.append((to_tensor(image), {"boxes": corners, "labels": torch.tensor([label + 1 for label, *_ in boxes])}))
    return data


def build(name: str) -> nn.Module:
    sizes: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": SIDE, "max_size": SIDE}
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=11, **sizes)


def train(model: nn.Module, data: Data, epochs: int, lr: float) -> None:
    """One step a batch, as in torchvision's references: the model gives its losses, their sum is minimised."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    steps = epochs * -(-len(data) // 8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data)).split(8):
            batch = [data[k] for k in index.tolist()]
            losses = model([image for image, _ in batch], [target for _, target in batch])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def precision(model: nn.Module, data: Data) -> float:
    """Mean over the classes of the average precision at an overlap of one half."""
    model.eval()
    found: dict[int, list[tuple[float, bool]]] = {label: [] for label in range(1, 11)}
    there = dict.fromkeys(found, 0)
    for image, target in data:
        (answer,) = model([image])
        for label in found:
            boxes = target["boxes"][target["labels"] == label]
            there[label] += len(boxes)
            mine = answer["labels"] == label
            taken: set[int] = set()
            for box, score in zip(answer["boxes"][mine], answer["scores"][mine].tolist()):  # best scores first
                best, which = box_iou(box[None], boxes)[0].max(0) if len(boxes) else (torch.tensor(0.0), torch.tensor(-1))
                right = best.item() >= 0.5 and int(which) not in taken
                taken |= {int(which)} if right else set()
                found[label].append((score, right))
    return sum(_area(found[label], there[label]) for label in found) / len(found)


def _area(found: list[tuple[float, bool]], there: int) -> float:
    """Below the curve of precision over recall, with the largest precision at that recall or beyond."""
    if not found or not there:
        return 0.0
    right = torch.tensor([r for _, r in sorted(found, reverse=True)], dtype=torch.float64)
    precisions = right.cumsum(0) / torch.arange(1, len(right) + 1)
    best = precisions.flip(0).cummax(0).values.flip(0)
    return float((best * right).sum() / there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fasterrcnn_mobilenet_v3_large_320_fpn", help="default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the backbone's MACs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--finetune-epochs", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="1 epoch on 16 images")
    args, console = parser.parse_args(), Console(soft_wrap=True)
    epochs, finetune, images = (1, 1, 16) if args.quick else (args.epochs, args.finetune_epochs, args.images)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, held_out = load("train", images), load("val", max(images // 4, 8))
    rows: dict[str, list[str]] = {"AP50": [], "parameters of the backbone": []}

    def note(model: nn.Module) -> None:
        rows["AP50"].append(f"{precision(model, held_out):.3f}")
        rows["parameters of the backbone"].append(f"{sum(p.numel() for p in model.get_submodule('backbone').parameters()):,}")

    model = build(args.model)
    train(model, data, epochs, lr=1e-3)
    note(model)
    start = time.process_time()
    example = [image for image, _ in data[:2]]
    small = stp_fx.prune_submodule(model, "backbone", example, "magnitude", args.ratio, target="macs")
    before, after = stp_fx.report_of(small.get_submodule("backbone")).macs
    console.print(f"Backbone pruned to {after / before:.1%} of its MACs in {time.process_time() - start:.1f} s")
    note(small)
    train(small, data, finetune, lr=5e-4)
    note(small)

    table = Table(title=f"{args.model}: {images} images, {epochs} epochs", title_justify="left")
    for column in ("", "before", "right after pruning", f"after {finetune} more"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


if __name__ == "__main__":
    main()
