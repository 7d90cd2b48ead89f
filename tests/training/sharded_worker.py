"""One process of tests/training/test_sharded.py: `torchrun ... sharded_worker.py FOLDER CASE...`."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

import stp_fx
from stp_fx.errors import FileError, InputError, PassError

Batch = tuple[torch.Tensor, torch.Tensor]
IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(32) % 4
TOKENS = torch.randint(0, 50, (32, 8), generator=torch.Generator().manual_seed(1))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 15, 3, padding=1, bias=False), nn.BatchNorm2d(15)
        self.conv, self.head = nn.Conv2d(15, 19, 3, padding=1), nn.Linear(19, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.outer = nn.Linear(48, 16), nn.Linear(16, 23, bias=False), nn.Linear(23, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(F.gelu(self.middle(F.gelu(self.inner(x.flatten(1)[:, :48])))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.norms[0](x)
        b, n, width = read.shape
        q, k, v = (each(read).view(b, n, 4, width // 4).transpose(1, 2) for each in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Vit(nn.Module):
    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(1, 4, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and how it is pruned in four epochs of two steps each."""

    network: Callable[[], nn.Module]
    criterion: str = "magnitude"
    compensation: str | None = None
    momentum: bool = False  # SGD with momentum in place of AdamW
    tensor_parallel: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def language(self) -> bool:
        return "llama" in getattr(self.network, "__qualname__", "") or isinstance(self.network, type(lambda: 0))


CASES = {
    "cnn": Case(Cnn, momentum=True),
    "cnn mean": Case(Cnn, "variance", "mean"),
    "cnn least squares": Case(Cnn, "variance", "least_squares", options={"target": "macs", "scope": "global"}),
    "cnn removes": Case(Cnn, "variance", "mean", options={"mask_until_last": False}),
    "tensor parallel": Case(Mlp, momentum=True, tensor_parallel=True),
    "tensor parallel mean": Case(Mlp, "variance", "mean", tensor_parallel=True),
    "vit": Case(Vit),
    "vit mean": Case(Vit, "variance", "mean"),
    "vit least squares": Case(Vit, "variance", "least_squares"),
    "llama": Case(lambda: llama(False)),
    "llama least squares": Case(lambda: llama(False), "variance", "least_squares"),
    "llama tied": Case(lambda: llama(True), "variance", "mean"),
}


def traced(case: Case) -> stp_fx.ir.captured.CapturedGraph | Any:
    torch.manual_seed(0)
    network = case.network()
    if case.language:
        return stp_fx.trace(network, (TOKENS[:2],), outputs="logits")
    return stp_fx.trace(network, IMAGES[:2])


def batches(case: Case) -> list[Any]:
    if case.language:
        return [(TOKENS[k : k + 4],) for k in range(0, 32, 4)]
    return [(IMAGES[k : k + 4], LABELS[k : k + 4]) for k in range(0, 32, 4)]


def loss_of(case: Case, model: nn.Module, batch: Any) -> torch.Tensor:
    if case.language:
        return F.cross_entropy(model(batch[0]).logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())
    return F.cross_entropy(model(batch[0]), batch[1])


class Run:
    """The case's network in training, in shards where there is ``wrap``; ``rank`` of ``world`` reads its part of the data."""

    def __init__(self, case: Case, wrap: Any = None, rank: int = 0, world: int = 1) -> None:
        self.case, self.data = case, batches(case)
        gm = traced(case)
        if wrap is not None:
            wrap(gm)
        rate = 0.003
        self.optimizer: Any = (
            torch.optim.SGD(gm.parameters(), lr=rate, momentum=0.9)
            if case.momentum
            else torch.optim.AdamW(gm.parameters(), lr=rate)
        )
        reads = case.compensation is not None or case.criterion != "magnitude"
        self.pat = stp_fx.PATPassManager(
            gm, criterion=case.criterion, ratio=0.4, steps=3, compensation=case.compensation, optimizer=self.optimizer, wrap=wrap,
            train_loader=self.data[rank::world] if reads else None, validate=False, **case.options,
        )  # fmt: skip

    def train(self, epochs: range) -> Run:
        for epoch in epochs:
            self.pat.prune(epoch)
            # The statistics of BatchNorm are those of the rank: all ranks are given the same two batches.
            self.pat.parallel.train()
            for batch in self.data[:2]:
                self.optimizer.zero_grad()
                loss_of(self.case, self.pat.parallel, batch).backward()
                self.optimizer.step()
        return self

    def result(self) -> dict[str, Any]:
        """The plan, the whole model, and the whole state of the optimizer, by name."""
        states = {
            f"{name}/{key}": _whole(value)
            for name, p in self.pat.model.named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, torch.Tensor)
        }
        model = {name: _whole(tensor) for name, tensor in self.pat.model.state_dict().items()}
        return {"plan": self.pat.state_dict()["plan"], "model": model, "optimizer": states}


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharding(case: Case) -> Callable[[nn.Module], nn.Module]:
    """What shards a graph of the case: the layers of each block together and then the rest, or as DTensor alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(gm: Any) -> nn.Module:
        blocks: dict[str, list[nn.Module]] = {}
        for node in gm.graph.nodes:
            if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), (nn.Linear, nn.Conv2d)):
                known = blocks.setdefault(str(node.target).rpartition(".")[0], [])
                known += (
                    []
                    if any(each is gm.get_submodule(str(node.target)) for each in known)
                    else [gm.get_submodule(str(node.target))]
                )
        for name, layers in blocks.items():
            if name:
                fully_shard(layers, mesh=mesh)
        return fully_shard(gm, mesh=mesh)

    def partition(name: str, module: nn.Module, mesh: Any) -> None:
        for own, p in list(module._parameters.items()):
            placements = {"inner": Shard(0), "middle": Shard(1) if own == "weight" else Replicate(), "outer": Replicate()}
            if p is not None and name in placements:
                module._parameters[own] = nn.Parameter(distribute_tensor(p.detach(), mesh, [placements[name]]))

    def distribute(gm: nn.Module) -> nn.Module:
        def into(module: nn.Module, inputs: Any, mesh: Any) -> Any:
            return tuple(distribute_tensor(each, mesh, [Replicate()]) for each in inputs)

        def out(module: nn.Module, output: Any, mesh: Any) -> Any:
            return output.full_tensor()

        return distribute_module(gm, mesh, partition, into, out)

    return distribute if case.tensor_parallel else shard


def refused() -> None:
    """What is not possible in shards is refused when the manager is made, and the model trains on."""
    case = CASES["cnn"]
    shard, data = sharding(case), batches(case)
    gm = traced(case)
    shard(gm)
    arguments: dict[str, dict[str, Any]] = {
        "give `wrap`": {"wrap": None},
        "gradients": {"criterion": "taylor", "train_loader": data},
        "covariances": {"criterion": "reconstruction", "train_loader": data},
        "compensation": {"compensation": "sequential", "train_loader": data},
        "recalibrate": {"recalibrate": 2, "train_loader": data},
        "regularizer": {"regularizer": "growing"},
        "validate": {"validate": True},
        "latency": {"target": "latency"},
        "inplace": {"inplace": False},
    }
    for text, given in arguments.items():
        with pytest.raises(InputError, match=text):
            stp_fx.PATPassManager(gm, **{"optimizer": (), "wrap": shard, **given})
    with pytest.raises(InputError, match="followers"):
        stp_fx.PATPassManager(gm, optimizer=(), wrap=shard, followers=[traced(case)])
    with pytest.raises(InputError, match=r"sharded over processes.*PATPassManager"):
        stp_fx.prune_graph(gm)
    plain = traced(case)
    with pytest.raises(InputError, match="shards the model in place"):
        stp_fx.PATPassManager(plain, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1), wrap=shard)
    vit = traced(CASES["vit"])
    fully_shard(vit.get_submodule("blocks.0"), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(InputError, match=r"'blocks.0' was given to fully_shard, and the graph calls the"):
        stp_fx.PATPassManager(vit, optimizer=(), wrap=shard)
    gm(IMAGES[:4]).sum().backward()


def failing(rank: int) -> None:
    """A step that fails on one rank, or on all, leaves the model, the optimizer and the manager as they were."""
    case = CASES["cnn mean"]
    shard = sharding(case)
    run = Run(case, shard, rank, dist.get_world_size())
    before = run.result()
    model = run.pat.model
    run.pat._passes = dataclasses.replace(run.pat._passes, loader=batches(case)[: 2 + rank])
    with pytest.raises(InputError, match="rank 0 has 2 batches, and rank 1 has more"):
        run.pat.prune(0)
    assert run.pat.model is model
    assert run.pat.taken == 0
    _same(before, run.result())


def broken(rank: int) -> None:
    """A rank that fails alone: the others learn it soon, by name. Its collectives no longer meet, so this comes last."""
    case = CASES["cnn mean"]
    run = Run(case, sharding(case), rank, dist.get_world_size())
    model = run.pat.model

    def data() -> Iterator[Batch]:
        yield from batches(case)[:1]
        if rank == 1:
            raise OSError("the disk is gone")

    run.pat._passes = dataclasses.replace(run.pat._passes, loader=data())
    since = time.monotonic()
    kind, text = (InputError, "disk is gone") if rank == 1 else (PassError, "rank 1 failed with InputError")
    with pytest.raises(kind, match=text):
        run.pat.prune(0)
    assert time.monotonic() - since < 30
    assert run.pat.model is model
    assert run.pat.taken == 0


def saved(folder: Path, rank: int, world: int) -> None:
    """A run that is saved masked and again shortened, and loaded each time, goes on as the run without a break."""
    case = CASES["cnn mean"]
    shard = sharding(case)
    first = Run(case, shard, rank, world).train(range(2))
    first.pat.save(folder / "masked")
    with pytest.raises(FileError, match="exists"):
        first.pat.save(folder / "masked")
    second = Run(case, shard, rank, world)
    second.pat.load(folder / "masked")
    _same(first.result(), second.result())
    second.train(range(2, 3)).pat.save(folder / "shortened")
    third = Run(case, shard, rank, world)
    third.pat.load(folder / "shortened")
    _same(second.result(), third.result())
    _same(first.train(range(2, 4)).result(), third.train(range(3, 4)).result())
    with pytest.raises(FileError, match="there is no file"):
        third.pat.load(folder / "missing")


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["plan"] == other["plan"]
    for part in ("model", "optimizer"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())


def main() -> None:
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # FSDP, of any linear layer on tokens
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in names:
        if name in ("load", "save", "load and save"):  # tests/training/test_sharded.py starts these with 4, 2 and 4 ranks
            case, at = CASES["vit mean"], {"save": range(2), "load and save": range(2, 3), "load": range(3, 4)}[name]
            run = Run(case, sharding(case), rank, world)
            if name != "save":
                run.pat.load(folder / f"{at.start}")
            run.train(at)
            if name == "load":
                torch.save(run.result(), folder / f"vit mean-{rank}.pt")
            else:
                run.pat.save(folder / f"{at.stop}")
        elif name in CASES:
            run = Run(CASES[name], sharding(CASES[name]), rank, world)
            torch.save(run.train(range(4)).result(), folder / f"{name}-{rank}.pt")
        else:
            {"refused": refused, "failing": lambda: failing(rank), "saved": lambda: saved(folder, rank, world)}.get(
                name, lambda: broken(rank)
            )()
        if name != "broken":
            dist.barrier()
    time.sleep(2 * rank)  # a process that has failed stays alive; that it is gone is another error
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # after `broken`, a collective of the other rank is pending, and destroying its group would wait for it


if __name__ == "__main__":
    main()
