"""Memory of each process while a sharded network is pruned, beside one process that holds it whole.

    python benchmarks/sharded_memory.py [--ranks 1,2,4] [--layers 16] [--width 512] [--out benchmarks/results/sharded_memory]

Residual blocks of two linear layers, random weights, float32, ``fully_shard`` over each block's layers on gloo. Three numbers of
each process, the largest of all ranks, in MB above what the process has before the network is made: after the optimizer's first
step (weights and Adam's two moments); the peak of the masked step; the peak of the step that removes. One rank is the
network without shards. Each row is a job of its own; one thread; freed tensors are given back to the system at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from _common import RESULTS, machine, markdown_machine, markdown_table, peak_resident, reset_peak, write
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stp_fx

HEADER = ("ranks", "criterion", "whole weights MB", "held MB", "peak of a masked step MB", "peak of the removal MB")


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def worker(layers: int, width: int, criterion: str) -> None:
    """One process of a job; rank 0 prints the row."""
    torch.set_num_threads(1)
    sharded = int(os.environ["WORLD_SIZE"]) > 1
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(8, width)
    tiny = stp_fx.trace(Block(8), torch.randn(2, 8))  # what is imported and compiled at first use is not the network's
    stp_fx.prune_graph(tiny, "variance", calibration=[torch.randn(4, 8)])
    start = psutil.Process().memory_info().rss
    gm = stp_fx.trace(nn.Sequential(*(Block(width) for _ in range(layers))), x, validate=False)
    total = sum(p.numel() * p.element_size() for p in gm.parameters()) / 1e6

    def shard(graph: Any) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for number in range(layers):
            fully_shard([graph.get_submodule(f"{number}.up"), graph.get_submodule(f"{number}.down")], mesh=mesh)
        return fully_shard(graph, mesh=mesh)

    if sharded:
        shard(gm)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-4)
    pat: Any = stp_fx.PATPassManager(
        gm, criterion=criterion, ratio=0.5, steps=2, optimizer=optimizer, wrap=shard if sharded else None, train_loader=[x] * 2,
        validate=False,
    )  # fmt: skip
    del gm

    def train() -> None:
        pat.parallel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    found = []
    for epoch in range(2):
        gc.collect()
        reset_peak()
        if not found:
            found.append(psutil.Process().memory_info().rss - start)
        pat.prune(epoch)
        found.append(peak_resident() - start)
        train()
    largest = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps({"whole": total, "found": [round(each / 1e6) for each in largest.tolist()]}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int, layers: int, width: int, criterion: str) -> dict[str, Any]:
    """One row."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps what was freed, by a threshold that grows
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = [
            os.path.abspath(__file__),
            "--worker",
            "--layers",
            str(layers),
            "--width",
            str(width),
            "--criterion",
            criterion,
        ]
        done = subprocess.run([*launcher, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=env)
    return {"ranks": ranks, "criterion": criterion, **json.loads(done.stdout.strip().splitlines()[-1])}


def main() -> None:
    """Measures all rows and writes them as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--criterion", default="magnitude", help="several with commas")
    parser.add_argument("--worker", action="store_true", help="one process of a job")
    parser.add_argument("--out", type=Path, default=RESULTS / "sharded_memory")
    options = parser.parse_args()
    if options.worker:
        worker(options.layers, options.width, options.criterion)
        return
    rows = []
    for criterion in options.criterion.split(","):
        for ranks in map(int, options.ranks.split(",")):
            rows.append(measured(ranks, options.layers, options.width, criterion))
            print(rows[-1], flush=True)
    cells = [[str(r["ranks"]), r["criterion"], f"{r['whole']:.0f}", *map(str, r["found"])] for r in rows]
    facts = machine()
    explained = (__doc__ or "").split("\n" * 2)[2]
    table = markdown_table(HEADER, cells, left=2)
    text = f"# Memory of a process in sharded training\n\n{markdown_machine(facts)}\n\n{explained}\n\n{table}\n"
    write(options.out, text, {"machine": facts, "rows": rows})


if __name__ == "__main__":
    main()
