"""Optimizers beside a pruning step: does each go on as a plain one of its kind would?

    python benchmarks/optimizers.py [--out benchmarks/results/optimizers]

A small convolutional network in double precision is trained for three steps, pruned, and trained for three more, in all eight
combinations of masking or removing, no compensation or the mean's (which adds a bias), and both memory formats. The oracle
(`tests/training/optimizer_cases.py`) is a new optimizer without fused or foreach kernels on a contiguous copy of the network,
whose state is cut by hand. A cell is the largest difference of a weight, relative to the largest of its tensor; "refused" means
that the library refused the optimizer by name, and that nothing had changed by then. Optimizers of packages that are not
installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from _common import RESULTS, machine, markdown_machine, markdown_table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
from optimizer_cases import CASES, COMBINATIONS, refused, run  # type: ignore[import-not-found]

LIBRARIES = {"timm": "timm", "torchao": "torchao", "transformers": "transformers", "schedule-free": "schedulefree"}
LIMIT = 1e-6


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(library) is not None for word, library in LIBRARIES.items() if name.startswith(word))


def title(masks: bool, compensation: str | None, memory: torch.memory_format) -> str:
    layout = "contiguous" if memory is torch.contiguous_format else "channels last"
    return f"{'mask' if masks else 'remove'}, {compensation or 'no compensation'}, {layout}"


def cell(name: str, masks: bool, compensation: str | None, memory: torch.memory_format) -> tuple[str, bool]:
    """The row of the table, and whether its numbers are right."""
    found, by = run(name, masks, compensation, memory), refused(name, compensation)
    if isinstance(found, str):
        return "refused", by is not None and by in found
    return f"{found:.0e}", by is None and found < LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers")
    parser.add_argument("--only", default="", help="names that begin with this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for ZeroRedundancyOptimizer
    header = ["optimizer", *(title(*each) for each in COMBINATIONS)]
    rows, wrong = [], []
    for name in filter(installed, CASES):
        if not name.startswith(arguments.only):
            continue
        cells = [cell(name, *each) for each in COMBINATIONS]
        rows.append([name, *(text for text, _ in cells)])
        wrong += [f"{name}: {where}" for where, (_, right) in zip(header[1:], cells, strict=True) if not right]
        print(*rows[-1], sep=" | ", flush=True)
    dist.destroy_process_group()
    verdict = f"{len(rows)} optimizers, {len(rows) * len(COMBINATIONS)} cells, {len(wrong)} not as they have to be"
    table = markdown_table(header, rows, left=1)
    text = f"# Optimizers beside a pruning step\n\n{markdown_machine(machine())}\n\n{table}\n\n{verdict}\n"
    write(arguments.out, text + "".join(f"- {each}\n" for each in wrong), {"machine": machine(), "rows": rows, "wrong": wrong})
    print(verdict)


if __name__ == "__main__":
    main()
