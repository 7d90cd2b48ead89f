"""Train a small residual network on handwritten digits, remove half of its multiply-accumulates in several ways, compare.

The same trained network is pruned by magnitude alone, with BatchNorm measured again, and with sequential repair; each result
is then fine-tuned. Beside them, one network is pruned while it trains (PAT), in as many epochs. The images are scikit-learn's
bundled digits (1,797 of 8 x 8 pixels), so nothing is downloaded. Run it with ``make demo``, or ``python examples/demo.py
--ratio 0.7 --scope global``. Everything it writes goes to ``out/``; ``out/report.html`` shows it.
"""

from __future__ import annotations

import argparse
import base64
import copy
import html
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

    def __init__(self, widths: tuple[int, int, int] = (48, 96, 144), classes: int = 10) -> None:
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


def train(model: nn.Module, digits: Digits, epochs: int, lr: float, **pruning: Any) -> None:
    """SGD with momentum along a one-cycle schedule; with ``pruning``, the arguments of a manager that prunes meanwhile."""
    steps = len(list(digits.batches())) * epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    pat = None
    if pruning:
        pat = stp_fx.PATPassManager(model, optimizer=optimizer, train_loader=list(digits.batches()), **pruning)
    model.train()
    for epoch in range(epochs):
        if pat is not None:
            pat.prune(epoch)
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
    """One row of cells per convolution with pruned output channels: filled cells are kept, pale cells are removed."""
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


def pruned_in_several_ways(gm: fx.GraphModule, digits: Digits, args: argparse.Namespace) -> dict[str, fx.GraphModule]:
    """The same network without half of its MACs. Repairs read training images, and no labels."""
    batches = [images for images, _ in digits.batches()]
    options: dict[str, Any] = {
        "criterion": args.criterion, "ratio": args.ratio, "scope": args.scope, "target": "macs", "round_to": args.round_to,
    }  # fmt: skip
    repairs: dict[str, dict[str, Any]] = {
        args.criterion: {},
        f"{args.criterion}, BatchNorm measured again": {"calibration": batches, "recalibrate": True},
        f"{args.criterion}, sequential repair": {"calibration": batches, "compensation": "sequential"},
    }
    return {name: stp_fx.prune_graph(gm, **options, **repair) for name, repair in repairs.items()}


def write_report(path: Path, tables: list[Table], pictures: list[Path], explorer: Path) -> None:
    """The tables and pictures in one page, with a link to the explorer."""
    parts = []
    for table in tables:
        cells = [[str(column.header) for column in table.columns], *zip(*(map(str, column.cells) for column in table.columns))]
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        parts.append(f"<h2>{html.escape(str(table.title))}</h2><table>{rows}</table>")
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>Kept and removed channels</h2><img alt="channels" src="data:image/png;base64,{data}">')
    parts.append(f'<p><a href="{explorer.name}">The network in the explorer</a>: layers, groups, costs, kept shares.</p>')
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:.2em 1em;text-align:right}"
    style += "td:first-child{text-align:left}tr:first-child{font-weight:bold}img{max-width:100%}"
    page = f'<!doctype html><meta charset="utf-8"><title>stp_fx demo</title><style>{style}</style><h1>stp_fx demo</h1>'
    path.write_text(page + "".join(parts), encoding="utf-8")


def table_of(title: str, heads: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(heads[0])
    for head in heads[1:]:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def costs(gm: fx.GraphModule, pruned: fx.GraphModule, example: Tensor) -> Table:
    """MACs, parameters and measured time, before and after."""
    both, images = [stp_fx.cost(each) for each in (gm, pruned)], len(example)
    rows = [
        ["MACs per image", *(f"{cost.macs // images:,}" for cost in both)],
        ["parameters", *(f"{cost.params:,}" for cost in both)],
        [f"latency of {images} images, one thread", *(f"{1e3 * s:.2f} ms" for s in latencies([gm, pruned], example))],
    ]
    return table_of("Cost", ["", "before", "after"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the MACs to remove (default: %(default)s)")
    parser.add_argument("--criterion", default="magnitude", help="default: %(default)s")
    parser.add_argument("--scope", default="local", choices=("local", "global"), help="default: %(default)s")
    parser.add_argument("--round-to", type=int, default=1, help="channels left per group: a multiple of this (default: 1)")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs (default: %(default)s)")
    parser.add_argument("--finetune-epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def compare(digits: Digits, args: argparse.Namespace, console: Console) -> tuple[nn.Module, list[fx.GraphModule], Table]:
    """The trained network, its graph and a pruned one, and the accuracy of every way to prune."""
    start = time.perf_counter()
    model = SmallResNet()
    untrained = copy.deepcopy(model)
    train(model, digits, args.epochs, lr=0.1)
    console.print(f"Trained {args.epochs} epochs on {len(digits.train[1])} images in {time.perf_counter() - start:.0f} s")

    gm = stp_fx.trace(model, digits.test[0][:64])
    start = time.perf_counter()
    rows, kept = [["not pruned", f"{accuracy(gm, digits):.2%}", "-"]], gm
    for name, pruned in pruned_in_several_ways(gm, digits, args).items():
        right_after = accuracy(pruned, digits)
        train(pruned, digits, args.finetune_epochs, lr=0.02)
        rows.append([name, f"{right_after:.2%}", f"{accuracy(pruned, digits):.2%}"])
        kept = pruned
    console.print(
        f"Pruned in three ways, and fine-tuned {args.finetune_epochs} epochs each, in {time.perf_counter() - start:.0f} s"
    )

    start, epochs = time.perf_counter(), args.epochs + args.finetune_epochs
    pat = stp_fx.trace(untrained, digits.test[0][:64])
    begin, steps = epochs // 4, max(1, min(4, epochs // 4))
    train(
        pat, digits, epochs, lr=0.1, criterion=args.criterion, ratio=args.ratio, scope=args.scope, target="macs",
        round_to=args.round_to, start_epoch=begin, steps=steps,
    )  # fmt: skip
    rows.append([f"pruned in {steps} steps while training (PAT)", "-", f"{accuracy(pat, digits):.2%}"])
    console.print(f"Trained another network {epochs} epochs, pruned meanwhile, in {time.perf_counter() - start:.0f} s\n")
    heads = [f"{args.ratio:.0%} of the MACs removed by", "right after", f"after {args.finetune_epochs} epochs"]
    return model, [gm, kept], table_of("Accuracy on the held-out quarter of the digits", heads, rows)


def main() -> None:
    args, console = arguments(), Console(soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    # More threads gain little on a network this small, and lose much where the cores are shared.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    digits = Digits()
    example = digits.test[0][:64]
    model, (gm, pruned), accuracies = compare(digits, args, console)
    costs_of_both = costs(gm, pruned, example)
    console.print(accuracies, costs_of_both)

    save_and_reload(pruned, example, args.out)
    console.print(f"\nPruned network, saved and loaded again: {args.out}/pruned.safetensors, {args.out}/pruned.plan.json")
    draw_channels(model, stp_fx.plan_of(pruned), args.out / "channels.png")
    explorer = args.out / "explorer.html"
    stp_fx.explore(gm, explorer, pruned=pruned, title="SmallResNet on digits")
    write_report(args.out / "report.html", [accuracies, costs_of_both], [args.out / "channels.png"], explorer)
    console.print(f"The report, for a browser: {args.out}/report.html")


if __name__ == "__main__":
    main()
