"""The cost of sequential repair, in forward passes over the same images and in memory.

    python benchmarks/repair_cost.py [--networks resnet50,vit_b_16] [--images 1024] [--batch 32] [--rounds 1]
        [--out benchmarks/results/repair_cost]

Networks of torchvision with random weights, of whose MACs magnitude pruning takes half; 224 x 224 images of random numbers. One
thread. A row is a process of its own: forward passes of the unpruned network and repairs in turns, beginning and ending with a
forward pass; medians. Times are processor seconds, which other work on the machine disturbs least; seconds on the clock are in
the JSON file. Memory is the peak of the process's resident memory, before the first repair (network, images, a forward pass) and
after the last.

Each row is written when it is done. The same command goes on where an interrupted one stopped; ``--again`` measures all anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from _common import RESULTS, machine, markdown_machine, markdown_table, peak_resident, run_child, write

import stp_fx
from stp_fx.passes import ReconstructSequentially

HEADER = (
    "network, MACs removed",
    "images",
    "batch",
    "forward s",
    "repair s",
    "repair / forward",
    "memory before GB",
    "peak GB",
    "measured",
)
REMOVED = 0.5


def worker(network: str, images: int, batch: int, rounds: int) -> dict[str, Any]:
    """One row: seconds of each round, and bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gm = stp_fx.trace(torchvision.models.get_model(network, weights=None).eval(), torch.randn(1, 3, 224, 224))
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", REMOVED, target="macs", validate=False))
    batches = [part.clone() for part in torch.randn(images, 3, 224, 224).split(batch)]

    def forward() -> None:
        with torch.no_grad():
            for x in batches:
                gm(x)

    taken: dict[str, list[list[float]]] = {"forward": [], "repair": []}
    with torch.no_grad():
        gm(batches[0])  # warm
    taken["forward"].append(_seconds(forward))
    before = peak_resident()
    repair = ReconstructSequentially(batches, plan=plan)
    for _ in range(rounds):
        taken["repair"].append(_seconds(lambda: repair(gm)))
        taken["forward"].append(_seconds(forward))
    return {"network": network, "images": images, "batch": batch, **taken, "before": before, "peak": peak_resident()}


def _seconds(call: Callable[[], object]) -> list[float]:
    """Of the processor, and of the clock on the wall."""
    processor, wall = time.process_time(), time.perf_counter()
    call()
    return [time.process_time() - processor, time.perf_counter() - wall]


def cells(row: dict[str, Any]) -> list[str]:
    forward, repair = (statistics.median(taken[0] for taken in row[kind]) for kind in ("forward", "repair"))
    return [
        f"{row['network']}, {REMOVED:.0%}",
        str(row["images"]),
        str(row["batch"]),
        f"{forward:.1f}",
        f"{repair:.1f}",
        f"{repair / forward:.2f}",
        f"{row['before'] / 1e9:.2f}",
        f"{row['peak'] / 1e9:.2f}",
        row["date"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50,vit_b_16")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "repair_cost")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker, options.images, options.batch, options.rounds)))
        return
    torch.set_num_threads(1)
    stored = options.out.with_suffix(".json")
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    for network in options.networks.split(","):
        key = {"network": network, "images": options.images, "batch": options.batch}
        known = [row for row in rows if key.items() <= row.items()]
        if known and not options.again:
            continue
        numbers = [str(each) for each in ("--images", options.images, "--batch", options.batch, "--rounds", options.rounds)]
        done = run_child([__file__, "--worker", network, *numbers], seconds=86400, gigabytes=1e3)
        if done.answer is None:
            print(f"{network}: {done.reason}")
            continue
        facts = machine()
        row = {**done.answer, "date": facts["date"], "command": facts["command"], "torch": facts["torch"]}
        rows = [*(each for each in rows if each not in known), row]
        table = markdown_table(HEADER, [cells(each) for each in rows])
        text = f"# Cost of sequential repair\n\n{markdown_machine(facts)}\n\n{(__doc__ or '').split(chr(10) * 2)[2]}\n\n{table}\n"
        write(options.out, text, {"machine": facts, "rows": rows})
        print(*zip(HEADER, cells(row), strict=True), sep="\n")


if __name__ == "__main__":
    main()
