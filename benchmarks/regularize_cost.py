"""The cost of the regularizers and of distillation in each training step, beside the step itself.

    python benchmarks/regularize_cost.py [--networks resnet50] [--batch 8] [--out benchmarks/results/regularize_cost]
    python benchmarks/regularize_cost.py --only distillation --networks resnet18 --out benchmarks/results/distillation_cost

One thread, 224 x 224, SGD with momentum; the contestants take turns. Seconds are the processor's, not the clock's, since
other programs may share the machine. Medians, and for the ratio the lowest and the highest turn. `gradients`: a manager's
`regularize()`; `loss`: the loss term and its backward pass (variance entropy: what a whole step takes longer, a small
difference of two long times: look at its spread); `step`: what follows each optimizer step, the mean over as many steps as
it takes to come round. Distillation: what a whole step takes longer with a teacher's `logits`, and with these and the ends of
the `blocks`; `forward`: a forward pass of the teacher alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torchvision
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from rich.table import Table
from torch import fx

import stp_fx
from stp_fx import regularizers

HEADER = ("network", "regularizer", "form", "training step s", "added s", "ratio", "lowest", "highest")
EVERY = 10  # steps between two rounds of gradual magnitude pruning


class Loop:
    """A training step on one batch of noise, with the loss term of ``regularizer`` if it has no other form, or with a teacher
    that is heard about logits and ``features``."""

    def __init__(
        self,
        gm: fx.GraphModule,
        batch: int,
        regularizer: str | None = None,
        teacher: fx.GraphModule | None = None,
        features: Literal["blocks"] | None = None,
    ) -> None:
        self.optimizer = torch.optim.SGD(gm.parameters(), lr=1e-6, momentum=0.9)
        self.images, self.labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
        self.pat = stp_fx.PATPassManager(gm, start_epoch=1, optimizer=self.optimizer, regularizer=regularizer)
        self.distill = None if teacher is None else stp_fx.Distillation(teacher, gm, features=features)

    def step(self) -> None:
        self.optimizer.zero_grad()
        output = self.pat.model(self.images)
        loss = torch.nn.functional.cross_entropy(output, self.labels) + self.pat.loss()
        if self.distill is not None:
            loss = loss + self.distill(output, self.images)
        loss.backward()
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


def teacher_forward(teacher: fx.GraphModule, images: torch.Tensor) -> None:
    with torch.no_grad():
        teacher(images)


def seconds_of(call: Callable[[], object], times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def measure(name: str, batch: int, rounds: int, only: str = "") -> list[list[str]]:
    torch.manual_seed(0)
    gm = stp_fx.trace(torchvision.models.get_model(name, weights=None).train(), torch.randn(2, 3, 224, 224))
    teacher = copy.deepcopy(gm).eval()
    longer = {
        ("variance_entropy", "loss"): Loop(copy.deepcopy(gm), batch, "variance_entropy"),
        ("distillation", "logits"): Loop(copy.deepcopy(gm), batch, teacher=teacher),
        ("distillation", "blocks"): Loop(copy.deepcopy(gm), batch, teacher=teacher, features="blocks"),
    }
    longer = {key: loop for key, loop in longer.items() if only in ("", key[0])}
    plain = Loop(gm, batch)
    called = calls(gm, torch.optim.SGD(gm.parameters(), lr=1e-6))
    called["distillation", "forward"] = (lambda: teacher_forward(teacher, plain.images), 1)
    called = {key: call for key, call in called.items() if only in ("", key[0])}
    steps: list[float] = []
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        step = seconds_of(plain.step)
        added = {key: seconds_of(loop.step) - step for key, loop in longer.items()}
        added |= {key: seconds_of(call, times) for key, (call, times) in called.items()}
        if turn:  # the first one warms up
            steps.append(step)
            for key, value in added.items():
                taken.setdefault(key, []).append(value)
    rows = []
    for key, values in sorted(taken.items()):
        ratios = [value / step for value, step in zip(values, steps, strict=True)]
        shown = [f"{each:.3f}" for each in (statistics.median(ratios), min(ratios), max(ratios))]
        rows.append([name, *key, f"{statistics.median(steps):.2f}", f"{statistics.median(values):.3f}", *shown])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a regularizer's name, or distillation")
    parser.add_argument("--out", type=Path, default=RESULTS / "regularize_cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for name in arguments.networks.split(",") for row in measure(name, arguments.batch, arguments.rounds, arguments.only)
    ]
    table = Table(*HEADER, title="what is added to a training step")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)
    what = arguments.only.capitalize() or "Regularizers and distillation"
    text = f"# {what} in a training step\n\n{markdown_machine(machine())}\n\n{markdown_table(HEADER, rows, left=3)}\n"
    write(arguments.out, text, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
