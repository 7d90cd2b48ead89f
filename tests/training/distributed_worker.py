"""One process of tests/training/test_distributed.py: `torchrun ... distributed_worker.py FOLDER`."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stp_fx
from stp_fx.errors import InputError, PassError, PlanError
from stp_fx.passes import RecalibrateBatchNorm, ReconstructBlockwise

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 4


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 3 * width, 3, padding=1, bias=False), nn.BatchNorm2d(3 * width)
        self.conv, self.head = nn.Conv2d(3 * width, 4 * width, 3, padding=1), nn.Linear(4 * width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


def batches(rank: int = 0, world: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the data, four images a batch."""
    return [(IMAGES[k : k + 4], LABELS[k : k + 4]) for k in range(4 * rank, 32, 4 * world)]


def plan(criterion: str, loader: list[tuple[torch.Tensor, torch.Tensor]], compensation: str | None) -> stp_fx.PrunePlan:
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(), IMAGES[:2])
    pruned = stp_fx.prune_graph(gm, criterion, 0.5, calibration=loader, compensation=compensation)
    return stp_fx.plan_of(pruned)


def trained(world: int, loader: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Two steps of pruning under DDP; every rank ends with the same smaller model."""
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(), IMAGES[:2])
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
    pat = stp_fx.PATPassManager(
        gm, criterion="variance", ratio=0.5, steps=2, compensation="mean", train_loader=loader, optimizer=optimizer,
        recalibrate=True, wrap=DistributedDataParallel,
    )  # fmt: skip
    assert isinstance(pat.parallel, DistributedDataParallel)
    for epoch in range(3):
        pat.prune(epoch)
        pat.parallel.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(pat.parallel(x), y).backward()
            optimizer.step()
    assert gm.get_parameter("conv.weight").shape == (8, 6, 3, 3)
    mine = torch.cat([p.detach().flatten() for p in gm.parameters()])
    others = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others)


def matched(world: int, loader: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Blocks trained on each rank's part of the data are the same on every rank, and have been trained."""
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(), IMAGES[:2])
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", 0.5))
    result = ReconstructBlockwise(loader, steps=4, start=None, plan=plan)(gm).graph_module
    assert not torch.equal(result.get_parameter("conv.weight"), gm.get_parameter("conv.weight"))
    mine = torch.cat([p.detach().flatten() for p in result.parameters()])
    others = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others)


def refused(rank: int) -> None:
    """Ranks whose weights differ are told so, all of them."""
    torch.manual_seed(rank)
    gm = stp_fx.trace(Net(), IMAGES[:2])
    pat = stp_fx.PATPassManager(gm, ratio=0.5)
    before = gm.get_parameter("conv.weight").clone()
    with pytest.raises(PlanError, match="ranks 0 and 1"):
        pat.prune(0)
    assert torch.equal(before, gm.get_parameter("conv.weight"))


def uneven(rank: int) -> None:
    """Ranks whose batches differ in size, number and resolution, with one of a single image, come to one repaired network."""
    size = 8 + 2 * rank
    images = torch.randn(9, 3, size, size, generator=torch.Generator().manual_seed(rank))
    loader = [images[k : k + 4] for k in range(0, 9, 4)] if rank == 0 else [images[:1], images[1:3]]
    for compensation in ("mean", "least_squares", "sequential"):
        torch.manual_seed(0)
        gm = stp_fx.trace(Net(), IMAGES[:2])
        pruned = stp_fx.prune_graph(gm, "variance", 0.5, calibration=loader, compensation=compensation)
        mine = torch.cat([p.detach().flatten() for p in pruned.parameters()])
        others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(others, mine)
        assert all(torch.allclose(mine, other) for other in others), compensation


def recalibrated(rank: int, loader: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """BatchNorm's statistics are those of all ranks' batches."""
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(), IMAGES[:2])
    found = RecalibrateBatchNorm([x for x, _ in loader])(gm).graph_module.get_submodule("norm")
    given = [gm.get_submodule("stem")(x) for x, _ in batches()]
    mean = torch.stack([each.mean((0, 2, 3)) for each in given]).mean(0)
    variance = torch.stack([each.transpose(0, 1).flatten(1).var(1) for each in given]).mean(0)
    assert torch.allclose(found.running_mean, mean, atol=1e-6)
    assert torch.allclose(found.running_var, variance, atol=1e-6)
    assert found.num_batches_tracked == len(given)


class Broken:
    """Data that fail on rank 1."""

    def __init__(self, rank: int, loader: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.rank, self.loader = rank, loader

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self.loader[0]
        if self.rank == 1:
            raise OSError("the disk is gone")


def failing(rank: int, loader: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """A rank that fails and stays alive: the others learn it soon, by name, and nothing is changed."""
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(), IMAGES[:2])
    pat = stp_fx.PATPassManager(gm, criterion="variance", ratio=0.5, train_loader=Broken(rank, loader), optimizer=())
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    since = time.monotonic()
    kind, text = (InputError, "disk is gone") if rank == 1 else (PassError, "rank 1 failed with InputError")
    for _ in range(2 - rank):  # rank 0 is told again, at once
        with pytest.raises(kind, match=text):
            pat.prune(0)
    assert time.monotonic() - since < 30
    assert pat.taken == 0
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


def sharded() -> None:
    """What is spread over ranks is refused by functions, and by a manager that does not know how to shard it; it trains on."""
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(), IMAGES[:2])
    fully_shard(gm, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(InputError, match=r"'stem.weight' is sharded.*fully_shard"):
        stp_fx.prune_graph(gm)
    with pytest.raises(InputError, match=r"sharded.*give `wrap`"):
        stp_fx.PATPassManager(gm, ratio=0.5)
    if hasattr(torch.cpu.Stream, "record_event"):  # without it, FSDP does not run on a CPU (torch 2.6)
        gm(IMAGES[:4]).sum().backward()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    loader = batches(rank, world)
    methods = (("variance", "mean"), ("taylor", None), ("reconstruction", "least_squares"), ("magnitude", "sequential"))
    for criterion, compensation in methods:
        (folder / f"{criterion}-{rank}.json").write_text(plan(criterion, loader, compensation).to_json())
    trained(world, loader)
    matched(world, loader)
    refused(rank)
    uneven(rank)
    recalibrated(rank, loader)
    sharded()
    torch.manual_seed(0)
    gm = stp_fx.trace(Net(width=48), IMAGES[:8])  # wide enough that fewer channels are faster, whatever else the machine does
    pat = stp_fx.PATPassManager(gm, ratio=0.0005, target="latency")  # every rank measures for itself
    pat.prune(0)
    failing(rank, loader)  # last: its collectives no longer meet
    del pat, gm
    gc.collect()  # as in the tutorial: gloo's threads must not outlive the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
