"""What a regularizer adds to a training step.

    python benchmarks/regularize_cost.py [--network resnet50] [--batch 8] [--out benchmarks/results/regularize_cost]

One thread; forward, backward and SGD with momentum, without and with each regularizer as the manager calls it. They take
turns, medians, the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from _common import RESULTS, machine, markdown_machine, markdown_table, timed, wide_console, write
from rich.table import Table

import stp_fx
from stp_fx import regularizers

HEADER = ("regularizer", "seconds a step", "ratio to a plain step")


class Step:
    """A training step of its own copy of the network."""

    def __init__(self, network: str, name: str | None) -> None:
        torch.manual_seed(0)
        self.gm = stp_fx.trace(torchvision.models.get_model(network, weights=None), torch.randn(1, 3, 224, 224)).train()
        self.optimizer = torch.optim.SGD(self.gm.parameters(), lr=1e-3, momentum=0.9)
        self.pat = stp_fx.PATPassManager(self.gm, start_epoch=1, optimizer=self.optimizer, regularizer=name)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        (F.cross_entropy(self.gm(x), y) + self.pat.loss()).backward()
        self.pat.regularize()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "regularize_cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [None, *regularizers.known_regularizers()]
    steps = {name or "none": Step(arguments.network, name) for name in names}
    x, y = torch.randn(arguments.batch, 3, 224, 224), torch.arange(arguments.batch)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            seconds = timed(lambda: step(x, y))[0]  # noqa: B023
            taken[name] += [seconds] if turn else []
    plain = statistics.median(taken["none"])
    rows = [[name, f"{statistics.median(t):.2f}", f"{statistics.median(t) / plain:.3f}"] for name, t in taken.items()]
    table = Table(*HEADER, title=f"{arguments.network}, batch {arguments.batch}")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)
    title = f"# Regularizers beside a training step: {arguments.network}, batch {arguments.batch}, 224 x 224"
    write(arguments.out, f"{title}\n\n{markdown_machine(machine())}\n\n{markdown_table(HEADER, rows)}\n", {"rows": rows})


if __name__ == "__main__":
    main()
