"""Budgets: how exactly a fraction of the MACs is removed, and how far off the closed form is.

    python benchmarks/budget.py [--networks resnet18,vit_b_16] [--out benchmarks/results/budget]

For each network and target: the fraction of MACs that ``prune_graph(target="macs")`` removed; by how many units that is
more than asked for (below one: giving back the costliest unit would miss the target); whether the predicted cost is what
PyTorch's own flop counter finds in the pruned network; and what is removed when every group keeps the ratio that the
report's closed form gives.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from rich.table import Table
from torch import fx

import stp_fx
from stp_fx.testing.measure import count_macs

NETWORKS = (
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
    "regnet_y_400mf", "shufflenet_v2_x1_0", "convnext_tiny", "vit_b_16", "swin_t",
)  # fmt: skip
TARGETS = (0.25, 0.5, 0.75)
HEADER = ("network", "target", "removed", "units over", "exact", "closed form", "error", "seconds")


def measure(gm: fx.GraphModule, target: float) -> dict[str, Any]:
    example = torch.randn(1, 3, 224, 224)
    whole = stp_fx.cost(gm).macs
    start = time.perf_counter()
    pruned = stp_fx.prune_graph(gm, "magnitude", target, target="macs")
    seconds = time.perf_counter() - start
    left = stp_fx.cost(pruned).macs
    keep = stp_fx.estimate_keep_ratio(gm, 1 - target)
    closed = stp_fx.cost(stp_fx.prune_graph(gm, "magnitude", 1 - keep)).macs / whole
    return {
        "removed": 1 - left / whole,
        "over": units_over(gm, stp_fx.plan_of(pruned), (1 - target) * whole),
        "exact": count_macs(pruned, (example,)) == left,
        "closed": 1 - closed,
        "seconds": seconds,
    }


def units_over(gm: fx.GraphModule, plan: stp_fx.PrunePlan, limit: float) -> float:
    """By how many units more was removed than asked for: MACs below the limit, over those of the plan's costliest unit."""
    graph = stp_fx.analyze(gm)
    gone = ~graph.survivors(plan).units

    def macs(removed: np.ndarray) -> int:
        return graph.survivors_without(removed).macs

    left = macs(gone)
    given_back = []
    for group in graph.groups:
        units = group.units[gone[group.units]]
        if len(units):
            gone[units[0]] = False
            given_back.append(macs(gone) - left)
            gone[units[0]] = True
    return (limit - left) / max(given_back)


def cells(name: str, target: float, row: dict[str, Any]) -> list[str]:
    return [
        name, f"{target:.0%}", f"{row['removed']:.4%}", f"{row['over']:.2f}", "yes" if row["exact"] else "no",
        f"{row['closed']:.2%}", f"{100 * (row['closed'] - target):+.2f} points", f"{row['seconds']:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--out", type=Path, default=RESULTS / "budget")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, rows, results = wide_console(), [], {}
    for name in arguments.networks.split(","):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = torchvision.models.get_model(name, weights=None).eval()
        gm = stp_fx.trace(model, torch.randn(1, 3, 224, 224))
        for target in TARGETS:
            results[f"{name} {target}"] = row = measure(gm, target)
            rows.append(cells(name, target, row))
            console.print("  ".join(rows[-1]))
    table = Table(*HEADER, title="budgets")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    text = f"""# Budgets

{markdown_machine(machine())}

Magnitude, local scope. `units over`: MACs removed beyond the target, in units (the costliest of the plan). `exact`: the
predicted MACs are those that PyTorch's flop counter finds in the pruned network. `closed form`: what is removed when
every group keeps the ratio that `estimate_keep_ratio` gives. `seconds`: search and removal.

{markdown_table(HEADER, rows)}
"""
    write(arguments.out, text, {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
