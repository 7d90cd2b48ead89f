"""Train a small residual network on handwritten digits, take half of its multiply-accumulates out, fine-tune.

The images are scikit-learn's bundled digits (1,797 of 8 x 8 pixels), so nothing is downloaded. Run it with
``make demo``, or ``python examples/demo.py --ratio 0.7 --scope global``. Everything it writes goes to ``out/``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, fx, nn

import stp_fx

SEED = 0
KEPT, REMOVED = "#2f6f9f", "#e8e2d8"


class Block(nn.Module):
    """Two 3 x 3 convolutions, added to their input; a strided 1 x 1 convolution on that where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Images ``[batch, 1, 8, 8]`` to logits ``[batch, 10]``: a stem, three stages of two blocks, a classifier."""

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 192), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stage1 = nn.Sequential(Block(widths[0], widths[0], 1), Block(widths[0], widths[0], 1))
        self.stage2 = nn.Sequential(Block(widths[0], widths[1], 2), Block(widths[1], widths[1], 1))
        self.stage3 = nn.Sequential(Block(widths[1], widths[2], 2), Block(widths[2], widths[2], 1))
        self.classifier = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


class Digits:
    """scikit-learn's digits, three quarters to train on and one quarter held out, in fixed order."""

    def __init__(self) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
        labels = torch.tensor(digits.target)
        train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=SEED, stratify=digits.target)
        self.train = images[train], labels[train]
        self.test = images[test], labels[test]

    def batches(self, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.train
        order = torch.randperm(len(labels))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield images[chosen], labels[chosen]


def train(model: nn.Module, digits: Digits, epochs: int, lr: float) -> None:
    """SGD with momentum along a one-cycle schedule."""
    steps = len(list(digits.batches())) * epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for images, labels in digits.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    images, labels = digits.test
    return (model(images).argmax(1) == labels).double().mean().item()


@torch.no_grad()
def latencies(models: list[nn.Module], batch: Tensor, rounds: int = 60) -> list[float]:
    """Median seconds per batch; the models take turns, so that a busy machine slows all of them alike."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, times in zip(models, taken):
            start = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[rounds // 6 :]) for times in taken]


def draw_channels(model: nn.Module, plan: stp_fx.PrunePlan, path: Path) -> None:
    """One row of cells per convolution whose output channels were pruned: filled cells stayed, pale cells went."""
    rows = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4 and (name, 0) in plan.kept:
            kept = {int(index) for index in plan.kept[name, 0]}
            rows.append((name.removesuffix(".weight"), [index in kept for index in range(parameter.shape[0])]))
    widest = max(len(cells) for _, cells in rows)
    figure = Figure(figsize=(2.6 + min(0.1 * widest, 10), 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (_, cells) in enumerate(rows):
        colors = [KEPT if kept else REMOVED for kept in cells]
        axes.barh([row] * len(cells), width=0.86, height=0.72, left=[i + 0.07 for i in range(len(cells))], color=colors)
    axes.set_yticks(range(len(rows)), [f"{name}  {sum(cells)}/{len(cells)}" for name, cells in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, widest)
    axes.set_xlabel("output channel", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=KEPT, label="kept"), Patch(color=REMOVED, label="removed")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_dependencies(graph: stp_fx.ChannelGraph, path: Path, console: Console) -> None:
    """Which layers lose channels together: a picture, or without Graphviz the text that it draws from."""
    written = graph.draw(path)
    console.print(f"Which layers lose channels together: {written}")
    if written != path:
        console.print(f"  For a picture of it, install Graphviz and run: dot -Tsvg {written} -o {path}")


def save_and_reload(pruned: fx.GraphModule, example: Tensor, out: Path) -> fx.GraphModule:
    """Write weights and plan; build the network again from an untrained one, and check that it computes the same."""
    plan_file, weight_file = out / "pruned.plan.json", out / "pruned.safetensors"
    plan_file.write_text(stp_fx.plan_of(pruned).to_json())
    save_file(pruned.state_dict(), weight_file)

    plan = stp_fx.PrunePlan.from_json(plan_file.read_text())
    reloaded = stp_fx.apply_plan(stp_fx.trace(SmallResNet().eval(), example), plan)
    reloaded.load_state_dict(load_file(weight_file))
    if not torch.equal(reloaded.eval()(example), pruned(example)):
        raise SystemExit("the reloaded network does not compute what the saved one does")
    return reloaded


def print_comparison(rows: dict[str, list[str]], console: Console) -> None:
    table = Table(title="Handwritten digits: accuracy on the held-out quarter, latency on one thread", title_justify="left")
    table.add_column("")
    for column in ("before", "right after pruning", "after fine-tuning"):
        table.add_column(column, justify="right")
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the MACs to remove (default: %(default)s)")
    parser.add_argument("--criterion", default="magnitude", help="default: %(default)s")
    parser.add_argument("--scope", default="local", choices=("local", "global"), help="default: %(default)s")
    parser.add_argument("--round-to", type=int, default=1, help="channels left per group: a multiple of this (default: 1)")
    parser.add_argument("--epochs", type=int, default=12, help="training epochs (default: %(default)s)")
    parser.add_argument("--finetune-epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), Console(soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    # More threads gain little on a network this small, and lose much where the cores are shared.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    digits = Digits()
    example = digits.test[0][:64]

    start = time.perf_counter()
    model = SmallResNet()
    train(model, digits, args.epochs, lr=0.1)
    console.print(f"Trained {args.epochs} epochs on {len(digits.train[1])} images in {time.perf_counter() - start:.0f} s")

    gm = stp_fx.trace(model, example)
    start = time.perf_counter()
    pruned = stp_fx.prune_graph(
        gm, criterion=args.criterion, ratio=args.ratio, scope=args.scope, target="macs", round_to=args.round_to
    )
    console.print(f"Pruned to {1 - args.ratio:.0%} of its MACs in {time.perf_counter() - start:.2f} s")
    right_after = copy.deepcopy(pruned)

    start = time.perf_counter()
    train(pruned, digits, args.finetune_epochs, lr=0.02)
    console.print(f"Fine-tuned {args.finetune_epochs} epochs in {time.perf_counter() - start:.0f} s\n")

    models = [gm, right_after, pruned]
    costs = [stp_fx.cost(each) for each in models]
    images = len(example)
    rows = {
        "accuracy": [f"{accuracy(each, digits):.2%}" for each in models],
        "MACs per image": [f"{cost.macs // images:,}" for cost in costs],
        "parameters": [f"{cost.params:,}" for cost in costs],
        f"latency of {images} images": [f"{1e3 * s:.2f} ms" for s in latencies(models, example)],
    }
    print_comparison(rows, console)

    save_and_reload(pruned, example, args.out)
    console.print(f"\nPruned network, saved and loaded again: {args.out}/pruned.safetensors, {args.out}/pruned.plan.json")
    draw_channels(model, stp_fx.plan_of(pruned), args.out / "channels.png")
    console.print(f"Which channels went: {args.out}/channels.png")
    draw_dependencies(stp_fx.analyze(gm), args.out / "dependencies.svg", console)


if __name__ == "__main__":
    main()
