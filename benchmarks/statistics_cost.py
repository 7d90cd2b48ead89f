"""The cost of collecting statistics, beside a plain forward pass over the same batches.

    python benchmarks/statistics_cost.py [--networks resnet50,vit_b_16] [--out benchmarks/results/statistics_cost]

One thread, eval mode, no gradients; the contestants take turns, medians, the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torchvision
from _common import RESULTS, machine, markdown_machine, markdown_table, timed, wide_console, write
from rich.table import Table

import stp_fx
from stp_fx.passes import CollectStatistics

HEADER = (
    "network",
    "images",
    "forward s",
    "mean and variance s",
    "ratio",
    "with mean maps s",
    "ratio",
    "with covariance s",
    "ratio",
)
KINDS = {"plain": {}, "maps": {"maps": True}, "covariance": {"covariance": True}}


def measure(name: str, images: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    batches = [torch.randn(images // 2, 3, 224, 224) for _ in range(2)]
    gm = stp_fx.trace(torchvision.models.get_model(name, weights=None).eval(), batches[0])
    stp_fx.analyze(gm)
    taken: dict[str, list[float]] = {"forward": [], **{kind: [] for kind in KINDS}}
    for turn in range(rounds + 1):
        with torch.no_grad():
            seconds = {"forward": timed(lambda: [gm(x) for x in batches])[0]}
        for kind, options in KINDS.items():
            seconds[kind] = timed(lambda: CollectStatistics(batches, **options)(gm))[0]  # noqa: B023
        for kind, value in seconds.items():
            taken[kind] += [value] if turn else []
    medians = {kind: statistics.median(values) for kind, values in taken.items()}
    cells = [name, str(images), f"{medians['forward']:.2f}"]
    for kind in KINDS:
        cells += [f"{medians[kind]:.2f}", f"{medians[kind] / medians['forward']:.2f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50,vit_b_16")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "statistics_cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, arguments.images, arguments.rounds) for name in arguments.networks.split(",")]
    table = Table(*HEADER, title="collecting statistics")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)
    text = f"# Collecting statistics\n\n{markdown_machine(machine())}\n\n{markdown_table(HEADER, rows)}\n"
    write(arguments.out, text, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
