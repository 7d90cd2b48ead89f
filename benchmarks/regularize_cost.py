"""What the regularizers cost in each training step, beside the step itself.

    python benchmarks/regularize_cost.py [--networks resnet50] [--batch 8] [--out benchmarks/results/regularize_cost]

One thread, 224 x 224, SGD with momentum; the contestants take turns, medians, the ratio is what counts. `gradients`: a
manager's `regularize()`; `loss`: the loss term and its backward pass (variance entropy: what a whole step takes longer);
`step`: what follows each optimizer step, the mean over as many steps as it takes to come round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from _common import RESULTS, machine, markdown_machine, markdown_table, timed, wide_console, write
from rich.table import Table
from torch import fx

import stp_fx
from stp_fx import regularizers

HEADER = ("network", "regularizer", "form", "training step s", "added s", "ratio")
EVERY = 10  # steps between two rounds of gradual magnitude pruning


class Loop:
    """A training step on one batch of noise, with the loss term of ``regularizer`` if it has no other form."""

    def __init__(self, gm: fx.GraphModule, batch: int, regularizer: str | None = None) -> None:
        self.optimizer = torch.optim.SGD(gm.parameters(), lr=1e-6, momentum=0.9)
        self.images, self.labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
        self.pat = stp_fx.PATPassManager(gm, start_epoch=1, optimizer=self.optimizer, regularizer=regularizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        output = self.pat.model(self.images)
        (torch.nn.functional.cross_entropy(output, self.labels) + self.pat.loss()).backward()
        self.optimizer.step()


def calls(gm: fx.GraphModule, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], tuple[Callable[[], object], int]]:
    """By name and form: what is called, and how many times in a row."""
    result: dict[tuple[str, str], tuple[Callable[[], object], int]] = {}
    for name in regularizers.known_regularizers():
        regularizer = regularizers.resolve(name)
        if "gradients" in regularizer.forms:
            manager = stp_fx.PATPassManager(gm, start_epoch=1, optimizer=optimizer, regularizer=regularizer)
            result[name, "gradients"] = (manager.regularize, 1)
        if set(regularizer.forms) == {"loss", "gradients"}:
            result[name, "loss"] = (lambda regularizer=regularizer: regularizer.loss(gm).backward(), 1)
    gmp = regularizers.GMP(0.5, steps=1, every=EVERY)
    result["gmp", "step"] = (lambda: gmp.after_step(gm), EVERY)
    return result


def measure(name: str, batch: int, rounds: int) -> list[list[str]]:
    torch.manual_seed(0)
    gm = stp_fx.trace(torchvision.models.get_model(name, weights=None).train(), torch.randn(2, 3, 224, 224))
    observed = Loop(copy.deepcopy(gm), batch, "variance_entropy")
    plain = Loop(gm, batch)
    called = calls(gm, torch.optim.SGD(gm.parameters(), lr=1e-6))
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        seconds = {("", "plain"): timed(plain.step)[0], ("variance_entropy", "loss"): timed(observed.step)[0]}
        for key, (call, times) in called.items():
            seconds[key] = sum(timed(call)[0] for _ in range(times)) / times
        for key, value in seconds.items():
            taken.setdefault(key, []).extend([value] if turn else [])
    medians = {key: statistics.median(values) for key, values in taken.items()}
    step = medians.pop(("", "plain"))
    medians["variance_entropy", "loss"] -= step
    return [[name, *key, f"{step:.2f}", f"{value:.3f}", f"{value / step:.3f}"] for key, value in sorted(medians.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "regularize_cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in arguments.networks.split(",") for row in measure(name, arguments.batch, arguments.rounds)]
    table = Table(*HEADER, title="regularizers in a training step")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)
    text = f"# Regularizers in a training step\n\n{markdown_machine(machine())}\n\n{markdown_table(HEADER, rows, left=3)}\n"
    write(arguments.out, text, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
